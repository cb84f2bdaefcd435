"""Positions: the table against a slow reading of it, and the rows that are kept early against all that may be meant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache import positions as p
from hiddenlake.cache.errors import UnknownNameError

Window = tuple[int, int] | None


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, Window]:
    """(prompt length, total length, exact-answer window), small enough that every edge is met."""
    q = draw(st.integers(1, 12))
    n = q + draw(st.integers(0, 12))
    if n == q or draw(st.booleans()):
        return q, n, None
    a = draw(st.integers(q, n - 1))
    return q, n, (a, draw(st.integers(a, n - 1)))


names = st.lists(st.sampled_from(p.NAMED) | st.integers(-30, 30).map(str), min_size=1, max_size=20)
mixed = st.lists(st.sampled_from((*p.NAMED, *p.POOLS)) | st.integers(-30, 30).map(str), min_size=1, max_size=20)


def meaning(name: str, q: int, n: int, window: Window) -> int:
    """The table, read slowly: every token is laid out and labelled, and the label is looked for."""
    labels: dict[str, int] = {}
    for token in range(n):
        labels[str(token)] = token
        labels[str(token - n)] = token
        if token < q and token + 1 >= q:
            labels["last_q"] = token
        if token == q:
            labels["first_answer"] = token
        if token == q + 1:
            labels["second_answer"] = token
        if window is not None:
            inside = window[0] <= token <= window[1]
            if inside:
                labels.setdefault("exact_answer_first", token)
                labels["exact_answer_last"] = token
            elif token < window[0]:
                labels["exact_answer_before_first"] = token
            else:
                labels.setdefault("exact_answer_after_last", token)
    return labels.get(name, -1)


@given(sequences(), names)
def test_resolve_follows_the_table(sequence: tuple[int, int, Window], wanted: list[str]) -> None:
    index = p.resolve(wanted, *sequence)
    assert index.dtype == np.int32
    assert index.tolist() == [meaning(name, *sequence) for name in wanted]


@given(sequences(), names)
def test_absent_is_never_another_token(sequence: tuple[int, int, Window], wanted: list[str]) -> None:
    _, n, window = sequence
    for name, token in zip(wanted, p.resolve(wanted, *sequence).tolist(), strict=True):
        assert token == -1 or 0 <= token < n
        if name in p.EXACT_ANSWER and window is None:
            assert token == -1
        if name not in p.NAMED and not -n <= int(name) < n:
            assert token == -1


@given(sequences(), mixed, st.sampled_from([None, "all", "all/3", "all_prompt/2", "all_generated"]))
def test_every_token_that_can_be_meant_is_wanted(
    sequence: tuple[int, int, Window], wanted: list[str], part: str | None
) -> None:
    q, n, window = sequence
    tokens = part and p.Tokens.parse(part)
    want = p.wanted(wanted, tokens, q)
    assert list(want.prompt) == sorted(set(want.prompt)) and all(0 <= token < q for token in want.prompt)
    meant = {token for token in p.resolve(wanted, *sequence).tolist() if token >= 0}
    meant |= {
        t for name in wanted if name in p.POOLS and p.POOLS[name][1] != "all" for t in p.span_of(name, q, n, window)
    }
    meant |= set(tokens.indices(q, n)) if tokens else set()
    for token in meant:
        if token >= q:
            assert want.answer is None or token - q in want.answer
        else:
            pooled = any(name in p.POOLS and p.POOLS[name][1] == "prompt" for name in wanted)
            assert token in want.prompt or pooled
    for name in wanted:
        if name in p.POOLS and p.POOLS[name][1] in ("prompt", "all"):
            assert p.POOLS[name][0] in want.pools
    if n - 1 in meant and n > q:
        assert want.last


def test_answer_rows_are_known_for_early_positions_only() -> None:
    assert p.wanted(["last_q"], None, 5).answer == []
    assert p.wanted(["last_q", "first_answer", "second_answer", "7"], None, 5).answer == [0, 1, 2]
    for late in (*p.EXACT_ANSWER, "-1", "mean_answer", "max_all"):
        assert p.wanted(["first_answer", late], None, 5).answer is None
    assert p.wanted(["last_q"], p.Tokens("all_prompt"), 5).answer == []
    assert p.wanted(["last_q"], p.Tokens("all"), 5).answer is None


def test_spans_of_pools() -> None:
    assert p.span_of("mean_prompt", 5, 9, None) == range(5)
    assert p.span_of("max_answer", 5, 9, None) == range(5, 9)
    assert p.span_of("mean_all", 5, 9, None) == range(9)
    assert p.span_of("mean_exact_answer", 5, 9, (6, 7)) == range(6, 8)
    assert not p.span_of("mean_exact_answer", 5, 9, None) and not p.span_of("max_answer", 5, 5, None)
    assert p.resolve(["mean_prompt", "max_answer", "mean_exact_answer"], 5, 5, None).tolist() == [-2, -1, -1]


@pytest.mark.parametrize(
    ("text", "indices"), [("all", [0, 1, 2, 3, 4]), ("all_prompt/2", [0, 2]), ("all_generated/2", [3])]
)
def test_token_level_parts(text: str, indices: list[int]) -> None:
    names, tokens = p.parse_positions(["-1", text])
    assert names == ("-1",) and str(tokens) == text
    assert list(tokens.indices(3, 5)) == indices


@pytest.mark.parametrize("text", ["all/0", "all/x", "all_prompt/-2", "all,all_prompt", "everything"])
def test_bad_token_level_parts_are_refused(text: str) -> None:
    with pytest.raises(UnknownNameError):
        p.parse_positions(text)


def test_paper_order_is_frozen() -> None:
    assert p.PAPER == (
        "last_q",
        "first_answer",
        "second_answer",
        "exact_answer_before_first",
        "exact_answer_first",
        "exact_answer_last",
        "exact_answer_after_last",
        "-8",
        "-7",
        "-6",
        "-5",
        "-4",
        "-3",
        "-2",
        "-1",
    )
    assert p.parse_positions("paper") == (p.PAPER, None)


def test_rules_version_is_frozen_with_what_it_means() -> None:
    # One sample that tells every rule from its neighbours. A change here is a new RULES_VERSION.
    assert p.RULES_VERSION == 1
    assert p.resolve((*p.PAPER, "0", "-99"), 10, 16, (12, 13)).tolist() == [
        *(9, 10, 11),
        *(11, 12, 13, 14),
        *(8, 9, 10, 11, 12, 13, 14, 15),
        *(0, -1),
    ]


def test_an_answer_that_starts_with_the_exact_answer() -> None:
    assert p.resolve(["exact_answer_before_first", "last_q"], 5, 8, (5, 6)).tolist() == [4, 4]


def test_an_answer_that_ends_with_the_exact_answer() -> None:
    assert p.resolve(["exact_answer_after_last", "exact_answer_last", "-1"], 5, 8, (6, 7)).tolist() == [-1, 7, 7]


def test_an_empty_answer() -> None:
    assert p.resolve(["last_q", "first_answer", "second_answer", "-1"], 5, 5, None).tolist() == [4, -1, -1, 4]


@pytest.mark.parametrize(("q", "n"), [(0, 5), (6, 5), (-1, 5)])
def test_impossible_lengths_are_refused(q: int, n: int) -> None:
    with pytest.raises(ValueError, match="prompt_length"):
        p.resolve(["last_q"], q, n, None)


@pytest.mark.parametrize("window", [(4, 6), (7, 6), (6, 8), (-1, 6)])
def test_a_window_outside_the_answer_is_refused(window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="within the answer"):
        p.resolve(["last_q"], 5, 8, window)


def test_parse_keeps_the_order_and_drops_repeats() -> None:
    assert p.parse_positions(" -1, last_q ,-1,007, last_q")[0] == ("-1", "last_q", "7")
    assert p.parse_positions([-1, 3, "-1"])[0] == ("-1", "3")
    assert p.parse_positions(["-1", "paper"])[0][:2] == ("-1", "last_q")


@pytest.mark.parametrize("names", ["", "last", "first_answer,", "1.5", "--1", "LAST_Q", []])
def test_unknown_positions_are_refused_with_the_known_ones(names: str) -> None:
    with pytest.raises(UnknownNameError, match="exact_answer_last"):
        p.parse_positions(names)


@given(st.lists(sequences(), min_size=1, max_size=8), mixed)
def test_in_answer(batch: list[tuple[int, int, Window]], wanted: list[str]) -> None:
    index = np.stack([p.resolve(wanted, *sequence) for sequence in batch], axis=1)
    inside = p.in_answer(wanted, index, np.array([q for q, _, _ in batch]))
    assert inside.shape == index.shape and inside.dtype == bool
    for sample, (q, n, _) in enumerate(batch):
        for position, name in enumerate(wanted):
            pooled = (
                name in p.POOLS and p.POOLS[name][1] in ("answer", "exact_answer") and index[position, sample] == -2
            )
            assert inside[position, sample] == (index[position, sample] in range(q, n) or pooled)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([*p.PAPER, "0", "5", "-20"]))
def test_only_positions_that_may_mean_the_last_token_do(q: int, answer: int, name: str) -> None:
    """An answer has one token at least, so the last token is never in the prompt."""
    last = q + answer - 1
    windows = [None, *((a, b) for a in range(q, last + 1) for b in range(a, last + 1))]
    if any(p.resolve([name], q, last + 1, window)[0] == last for window in windows):
        assert p.wanted([name], None, q).last


def test_the_last_prompt_token_needs_no_extra_step() -> None:
    assert not p.wanted(["last_q"], None, 5).last
