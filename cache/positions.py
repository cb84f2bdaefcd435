"""Positions: named or numbered tokens of one sample, and the token index that each one means.

With q the prompt's length, n the total length, and [a, b] the exact answer's minimal token window:

    last_q                     q-1
    first_answer               q
    second_answer              q+1
    exact_answer_before_first  a-1
    exact_answer_first         a
    exact_answer_last          b
    exact_answer_after_last    b+1
    -k                         n-k
    k                          k

A position that falls outside the sequence, or that needs an exact answer where there is none, is
absent: token index -1, never another token.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from hiddenlake.cache.errors import UnknownNameError

# Raised when the meaning of a position changes: part of the value identity.
RULES_VERSION = 1

ABSENT = -1

EXACT_ANSWER = (
    "exact_answer_before_first",
    "exact_answer_first",
    "exact_answer_last",
    "exact_answer_after_last",
)
NAMED = ("last_q", "first_answer", "second_answer", *EXACT_ANSWER)

# The 15 columns of the heatmaps in "LLMs Know More Than They Show", in their order.
PAPER = (*NAMED, *(str(-k) for k in range(8, 0, -1)))


def parse_positions(names: str | Iterable[str | int]) -> tuple[str, ...]:
    """Positions as canonical strings, without repeats, in the order given. `paper` means the paper's 15.

    Raises UnknownNameError for a name that is not in the table.
    """
    if isinstance(names, str):
        names = names.split(",")
    positions: list[str] = []
    for name in names:
        text = str(name).strip()
        if text == "paper":
            positions += PAPER
        elif text in NAMED:
            positions.append(text)
        elif re.fullmatch(r"-?\d+", text):
            positions.append(str(int(text)))
        elif text in ("all", "all_prompt", "all_generated"):
            raise UnknownNameError(
                f"position {text!r} asks for token-level capture, which this version does not have: "
                f"name single tokens, e.g. `paper` or `-1`"
            )
        else:
            raise UnknownNameError(
                f"unknown position {text!r}: expected `paper`, an integer, or one of {', '.join(NAMED)}"
            )
    if not positions:
        raise UnknownNameError(f"no position was named: expected `paper`, an integer, or one of {', '.join(NAMED)}")
    return tuple(dict.fromkeys(positions))


def resolve(
    positions: Sequence[str], prompt_length: int, total_length: int, exact_answer: tuple[int, int] | None
) -> np.ndarray:
    """Token index of each position in one sample.

    prompt_length : q, in tokens, chat template included.
    total_length : n, in tokens, end-of-sequence token included.
    exact_answer : inclusive window [a, b] in the whole sequence, or None where none was found.

    Returns (position,) int32: a 0-based index into prompt + answer, or -1 where the position is absent.
    """
    q, n = prompt_length, total_length
    if not 1 <= q <= n:
        raise ValueError(f"prompt_length {q} is not within 1 to total_length {n}")
    if exact_answer is not None and not q <= exact_answer[0] <= exact_answer[1] < n:
        raise ValueError(f"exact_answer window {exact_answer} is not within the answer [{q}, {n - 1}]")
    table = {"last_q": q - 1, "first_answer": q, "second_answer": q + 1}
    if exact_answer is not None:
        a, b = exact_answer
        table.update(zip(EXACT_ANSWER, (a - 1, a, b, b + 1), strict=True))
    index = np.full(len(positions), ABSENT, np.int32)
    for i, name in enumerate(positions):
        token = table.get(name, ABSENT) if name in NAMED else int(name) + (n if name.startswith("-") else 0)
        if 0 <= token < n:
            index[i] = token
    return index


def prompt_rows(positions: Sequence[str], prompt_length: int) -> list[int]:
    """Prompt tokens that some position may turn out to mean, known before anything is generated.

    -k lies in the prompt when the answer is shorter than k; exact_answer_before_first is last_q when
    the answer starts with the exact answer.
    """
    q = prompt_length
    wanted = set()
    for name in positions:
        if name in ("last_q", "exact_answer_before_first"):
            wanted.add(q - 1)
        elif name.startswith("-"):
            wanted.update(range(max(0, q + int(name)), q))
        elif name not in NAMED and int(name) < q:
            wanted.add(int(name))
    return sorted(wanted)


def answer_rows(positions: Sequence[str]) -> set[int] | None:
    """Offsets into the answer that some position may mean, or None when any of them may (late positions).

    An integer k may lie in the answer of a short prompt, at an offset that depends on it: that counts as late.
    """
    offsets: set[int] = set()
    for name in positions:
        if name == "first_answer":
            offsets.add(0)
        elif name == "second_answer":
            offsets.add(1)
        elif name != "last_q":
            return None
    return offsets


def may_mean_last_token(positions: Sequence[str]) -> bool:
    """Whether some position may be the sequence's last token, which an engine must then feed once more."""
    return any(name != "last_q" for name in positions)


def in_answer(token_index: np.ndarray, prompt_length: np.ndarray) -> np.ndarray:
    """Whether each stored token lies in the answer.

    token_index : (position, sample) int32, -1 where absent.
    prompt_length : (sample,) integers.

    Returns (position, sample) bool.
    """
    return token_index >= np.asarray(prompt_length)[None, :]
