"""Spans: the minimal window against byte offsets, over tokens that cut the text anywhere, and a real tokenizer."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hiddenlake.cache.spans import find_ignoring_case, find_window

# Short alphabets meet often. Characters of 1 to 4 bytes; İ and ß change length with case; a combining accent.
LETTERS = "aAbB .ßẞİıiéÉ\u0301Σσς日本🏙"
texts = st.text(LETTERS, max_size=24)


class Tokens:
    """A tokenizer whose tokens are any bytes: a byte-level decoder that replaces what is not UTF-8."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = list(pieces)
        self.ids = list(range(len(self.pieces)))
        self.calls = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.calls += 1
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def window_of_bytes(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that hold at least one of the bytes [start, end)."""
        holding, offset = [], 0
        for i, piece in enumerate(self.pieces):
            if max(offset, start) < min(offset + len(piece), end):
                holding.append(i)
            offset += len(piece)
        return holding[0], holding[-1]


def split(text: str, cuts: Sequence[int]) -> Tokens:
    raw = text.encode()
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    return Tokens([raw[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])


def first_occurrence(text: str, wanted: str) -> tuple[int, int] | None:
    """Compare at every place, character by character, and say which characters took part."""
    pattern = [low for character in wanted for low in character.lower()]
    lowered = [(low, i) for i, character in enumerate(text) for low in character.lower()]
    for start in range(len(lowered) - len(pattern) + 1):
        part = lowered[start : start + len(pattern)]
        if pattern and [low for low, _ in part] == pattern:
            return part[0][1], part[-1][1] + 1
    return None


def expected_window(tokens: Tokens, text: str, wanted: str) -> tuple[int, int] | None:
    found = first_occurrence(text, wanted)
    if found is None:
        return None
    return tokens.window_of_bytes(len(text[: found[0]].encode()), len(text[: found[1]].encode()))


cuts = st.lists(st.integers(1, 90), max_size=60)


@settings(max_examples=400)
@given(texts, texts, cuts)
def test_any_string_in_any_text(text: str, wanted: str, cuts: list[int]) -> None:
    assume(text)
    tokens = split(text, cuts)
    assert find_window(tokens.decode, tokens.ids, wanted) == expected_window(tokens, text, wanted.strip())


@settings(max_examples=600)
@given(st.data(), texts, cuts)
@example(None, "日", [1, 2])
def test_a_part_of_the_text_is_found(data: st.DataObject | None, text: str, cuts: list[int]) -> None:
    assume(text.strip())
    start = data.draw(st.integers(0, len(text) - 1)) if data else 0
    end = data.draw(st.integers(start + 1, len(text))) if data else 1
    wanted = text[start:end].strip()
    assume(wanted)
    tokens = split(text, cuts)
    window = find_window(tokens.decode, tokens.ids, wanted)
    assert window is not None
    assert window == expected_window(tokens, text, wanted)


@given(st.text("ab日é", min_size=1, max_size=6), texts, texts, cuts)
def test_the_first_of_repeated_answers_counts(answer: str, before: str, between: str, cuts: list[int]) -> None:
    text = before + answer + between + answer
    tokens = split(text, cuts)
    window = find_window(tokens.decode, tokens.ids, answer)
    assert window == expected_window(tokens, text, answer)
    assert window is not None and window[1] <= tokens.window_of_bytes(0, len((before + answer).encode()))[1]


@given(texts, texts, cuts, st.sampled_from(["Kyoto", "日本", "🏙", "é"]))
def test_at_the_very_start_and_the_very_end(before: str, after: str, cuts: list[int], answer: str) -> None:
    at_start = split(answer + after, cuts)
    assert find_window(at_start.decode, at_start.ids, answer) == at_start.window_of_bytes(0, len(answer.encode()))
    assume(first_occurrence(before + answer, answer) == (len(before), len(before + answer)))
    at_end = split(before + answer, cuts)
    window = find_window(at_end.decode, at_end.ids, answer)
    assert window is not None and window[1] == at_end.ids[-1]


@given(st.binary(max_size=30), st.lists(st.binary(max_size=4), max_size=10))
def test_what_is_not_there_is_not_found(raw: bytes, pieces: list[bytes]) -> None:
    tokens = Tokens([raw, *pieces])
    assert find_window(tokens.decode, tokens.ids, "\u2603\u2603") is None


@given(st.lists(st.sampled_from([b"", b" ", b"Ky", b"oto", b"Kyoto", b".", b"\xe6"]), max_size=12))
def test_tokens_without_bytes_and_broken_characters(pieces: list[bytes]) -> None:
    tokens = Tokens(pieces)
    start = b"".join(pieces).find(b"Kyoto")
    expected = tokens.window_of_bytes(start, start + 5) if start >= 0 else None
    assert find_window(tokens.decode, tokens.ids, "kyoto") == expected


@pytest.mark.parametrize("wanted", ["", " ", "\n\t"])
def test_nothing_is_not_found(wanted: str) -> None:
    tokens = split("a b", [1])
    assert find_window(tokens.decode, tokens.ids, wanted) is None


def test_an_empty_answer() -> None:
    assert find_window(Tokens([]).decode, [], "Kyoto") is None


def test_few_decodes_for_a_long_answer() -> None:
    pieces = [b" word"] * 4000 + [b" Ky", b"oto"] + [b" word"] * 4000
    tokens = Tokens(pieces)
    assert find_window(tokens.decode, tokens.ids, "Kyoto") == (4000, 4001)
    assert tokens.calls <= math.ceil(math.log2(len(pieces))) + 5


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("in JAPAN.", "Japan", "JAPAN"),
        ("İstanbul, TÜRKİYE", "Türkiye", None),  # İ is i and a dot in lower case: another word than with i
        ("İstanbul, TÜRKİYE", "türkİye", "TÜRKİYE"),
        ("İİİ in Japan", "japan", "Japan"),  # what grows in lower case must not move what follows
        ("STRAẞE", "straße", "STRAẞE"),
        ("Strasse", "straße", None),
        ("ΣΟΦΟΣ", "σοφοσ", "ΣΟΦΟΣ"),
        ("Niger or Nigeria", "NIGERIA", "Nigeria"),
    ],
)
def test_case(text: str, wanted: str, found: str | None) -> None:
    span = find_ignoring_case(text, wanted)
    assert (text[slice(*span)] if span else None) == found


@given(texts, texts)
def test_find_ignoring_case(text: str, wanted: str) -> None:
    assert find_ignoring_case(text, wanted) == first_occurrence(text, wanted)


@pytest.fixture(scope="module")
def smollm2(demo_model_folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(demo_model_folder)


def bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for. Source: GPT-2's bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The capital city of Kyoto is Kyoto, Japan.<|im_end|>", "japan"),
        ("Japan<|im_end|>", "Japan"),
        ("It is in Côte d'Ivoire, which is in Africa.", "CÔTE D'IVOIRE"),
        ("The city of 京都 is in 日本, that is Japan.", "日本"),
        ("🏙🏙🏙 São Tomé and Príncipe 🏙", "são tomé and príncipe"),
        ("İstanbul is in Türkiye, İstanbul!", "türkiye"),
        ("Nigeria, not Niger, nor nigeria", "Niger"),
        ("  several   spaces\n\n\tand Ukraine\n", "Ukraine"),
        ("United States of America", "United States"),
        ("unitedstatesofamerica", "states"),
        ("No country is named here.", "Japan"),
    ],
)
def test_a_real_tokenizer(smollm2, text: str, wanted: str) -> None:
    ids = smollm2.encode(text, add_special_tokens=False)
    byte = bytes_of_characters()
    pieces = [
        token.encode() if re.fullmatch(r"<\|\w+\|>", token) else bytes(byte[character] for character in token)
        for token in smollm2.convert_ids_to_tokens(ids)
    ]
    assert b"".join(pieces).decode() == text

    def decode(some: Sequence[int]) -> str:
        return smollm2.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    assert find_window(decode, ids, wanted) == expected_window(Tokens(pieces), text, wanted)
