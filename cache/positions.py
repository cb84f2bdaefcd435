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
    mean_prompt, max_prompt    over 0 .. q-1; likewise _answer (q .. n-1), _all and _exact_answer (a .. b)

A position that falls outside the sequence, or that needs an exact answer where there is none, is
absent: token index -1, never another token. A pooled position is no token: its index is -2.

`all`, `all_prompt` and `all_generated` mean every token of that part, and `all/8` every eighth: see Tokens.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hiddenlake.cache.errors import UnknownNameError

# Raised when the meaning of a position changes: part of the value identity.
RULES_VERSION = 1

ABSENT = -1
POOLED = -2

EXACT_ANSWER = (
    "exact_answer_before_first",
    "exact_answer_first",
    "exact_answer_last",
    "exact_answer_after_last",
)
NAMED = ("last_q", "first_answer", "second_answer", *EXACT_ANSWER)

# Poolings over a span: (the function, the span).
POOLS = {
    f"{how}_{span}": (how, span) for how in ("mean", "max") for span in ("prompt", "answer", "all", "exact_answer")
}

# The 15 columns of the heatmaps in "LLMs Know More Than They Show", in their order.
PAPER = (*NAMED, *(str(-k) for k in range(8, 0, -1)))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token-level coverage: every `every`-th token of one part of each sample.

    part : `all`, `all_prompt` or `all_generated`.  every : counted from the first token of the part.
    """

    part: str
    every: int = 1

    def __post_init__(self) -> None:
        if self.part not in ("all", "all_prompt", "all_generated") or self.every < 1:
            raise UnknownNameError(
                f"token-level coverage {self.part!r}, every {self.every}: expected all, all_prompt or all_generated, and 1 or more"
            )

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """`all_generated`, or `all/8` for every eighth token."""
        part, _, every = text.partition("/")
        if every and not re.fullmatch(r"[1-9]\d*", every):
            raise UnknownNameError(f"position {text!r}: expected a whole number behind the slash, e.g. {part}/8")
        return cls(part, int(every or 1))

    def __str__(self) -> str:
        return self.part if self.every == 1 else f"{self.part}/{self.every}"

    def indices(self, prompt_length: int, total_length: int) -> range:
        """Token indices of one sample, ascending."""
        start = prompt_length if self.part == "all_generated" else 0
        stop = prompt_length if self.part == "all_prompt" else total_length
        return range(start, stop, self.every)


def parse_positions(names: str | Iterable[str | int]) -> tuple[tuple[str, ...], Tokens | None]:
    """(named positions as canonical strings without repeats, in the order given; token-level coverage or None).

    `paper` means the paper's 15. Raises UnknownNameError for a name that is not in the table.
    """
    if isinstance(names, str):
        names = names.split(",")
    positions: list[str] = []
    tokens: set[Tokens] = set()
    for name in names:
        text = str(name).strip()
        if text == "paper":
            positions += PAPER
        elif text in NAMED or text in POOLS:
            positions.append(text)
        elif re.fullmatch(r"-?\d+", text):
            positions.append(str(int(text)))
        elif text.partition("/")[0] in ("all", "all_prompt", "all_generated"):
            tokens.add(Tokens.parse(text))
        else:
            raise UnknownNameError(
                f"unknown position {text!r}: expected `paper`, an integer, one of {', '.join(NAMED)}, a pooling "
                f"({', '.join(POOLS)}), or all, all_prompt or all_generated, with /k for every k-th token"
            )
    if len(tokens) > 1:
        raise UnknownNameError(
            f"positions {', '.join(sorted(map(str, tokens)))}: a capture holds one part of the tokens; `all` holds both"
        )
    if not positions and not tokens:
        raise UnknownNameError(f"no position was named: expected `paper`, an integer, or one of {', '.join(NAMED)}")
    return tuple(dict.fromkeys(positions)), next(iter(tokens), None)


def resolve(
    positions: Sequence[str], prompt_length: int, total_length: int, exact_answer: tuple[int, int] | None
) -> np.ndarray:
    """Token index of each position in one sample.

    prompt_length : q, in tokens, chat template included.
    total_length : n, in tokens, end-of-sequence token included.
    exact_answer : inclusive window [a, b] in the whole sequence, or None where none was found.

    Returns (position,) int32: a 0-based index into prompt + answer, -1 where the position is absent, -2 where it
    is pooled over a span (`span_of`).
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
        if name in POOLS:
            if span_of(name, q, n, exact_answer):
                index[i] = POOLED
            continue
        token = table.get(name, ABSENT) if name in NAMED else int(name) + (n if name.startswith("-") else 0)
        if 0 <= token < n:
            index[i] = token
    return index


def span_of(pool: str, prompt_length: int, total_length: int, exact_answer: tuple[int, int] | None) -> range:
    """Token indices that a pooled position is pooled over; empty where it is absent."""
    span = POOLS[pool][1]
    if span == "exact_answer":
        return range(0) if exact_answer is None else range(exact_answer[0], exact_answer[1] + 1)
    return range(prompt_length if span == "answer" else 0, prompt_length if span == "prompt" else total_length)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which tokens of a sample some position may turn out to mean, known before anything is generated.

    prompt : token indices in the prompt, ascending.
    answer : offsets into the answer, ascending, or None for any (late positions).
    pools : functions (`mean`, `max`) to apply to the whole prompt as it goes by.
    last : whether the sequence's last token may be meant, which an engine must then feed once more.
    """

    prompt: Sequence[int]
    answer: Sequence[int] | None
    pools: tuple[str, ...]
    last: bool

    def answer_rows(self, max_new_tokens: int) -> int:
        """Most answer tokens that may be meant."""
        return max_new_tokens if self.answer is None else len(self.answer)


def wanted(positions: Sequence[str], tokens: Tokens | None, prompt_length: int) -> Wanted:
    """What must be kept of a sample while it is generated.

    -k lies in the prompt when the answer is shorter than k; exact_answer_before_first is last_q when the answer
    starts with the exact answer.
    """
    q = prompt_length
    prompt: set[int] = set()
    offsets: set[int] = set()
    pools = set()
    late = tokens is not None and tokens.part != "all_prompt"
    for name in positions:
        if name in POOLS:
            how, span = POOLS[name]
            if span in ("prompt", "all"):
                pools.add(how)
            late |= span != "prompt"
        elif name == "last_q":
            prompt.add(q - 1)
        elif name in ("first_answer", "second_answer"):
            offsets.add(0 if name == "first_answer" else 1)
        elif name in EXACT_ANSWER:
            late = True
            if name == "exact_answer_before_first":
                prompt.add(q - 1)
        elif name.startswith("-"):
            late = True
            prompt.update(range(max(0, q + int(name)), q))
        else:
            token = int(name)
            if token < q:
                prompt.add(token)
            else:
                offsets.add(token - q)
    if tokens is not None and tokens.part != "all_generated":
        prompt.update(tokens.indices(q, q))
    return Wanted(sorted(prompt), None if late else sorted(offsets), tuple(sorted(pools)), late or bool(offsets))


def in_answer(positions: Sequence[str], token_index: np.ndarray, prompt_length: np.ndarray) -> np.ndarray:
    """Whether what each cell holds lies in the answer.

    token_index : (position, sample) int32, -1 where absent, -2 where pooled.
    prompt_length : (sample,) integers.

    Returns (position, sample) bool.
    """
    pooled = np.array([name in POOLS and POOLS[name][1] in ("answer", "exact_answer") for name in positions], bool)
    inside = token_index >= np.asarray(prompt_length)[None, :]
    return inside | ((token_index == POOLED) & pooled[:, None])
