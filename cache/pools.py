"""Pools: means and maxima over a span of tokens, computed before anything is stored."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Self

import ml_dtypes
import numpy as np

# Elements that are copied, checked or widened at a time, so that a long sample takes no more memory than a short one.
_BLOCK = 1 << 20


def widen(rows: np.ndarray) -> np.ndarray:
    """Rows as float32, exactly: bfloat16 given as uint16, float16, or float32."""
    if rows.dtype != np.uint16:
        return rows.astype(np.float32, copy=False)
    wide = rows.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def blocks(tokens: Sequence[int], elements: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of some tokens, each a megabyte or a few of rows of so many elements."""
    size = max(1, _BLOCK // elements)
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


# (token ids, token indices, rows) -> fault
Check = Callable[[Sequence[int], Sequence[int], np.ndarray], str | None]


class Pool:
    """Running mean and maximum of rows. count : rows added."""

    def __init__(self, functions: Sequence[str]) -> None:
        self.functions = tuple(functions)
        self.count = 0
        self._sum: np.ndarray | None = None
        self._max: np.ndarray | None = None
        self._dtype = np.dtype(np.float32)

    def add(self, rows: np.ndarray) -> None:
        """rows : (token, element) of stored bits, at least one."""
        self._dtype = rows.dtype
        values = widen(rows)
        if "mean" in self.functions:
            self._sum = values.sum(0, dtype=np.float64) + (0 if self._sum is None else self._sum)
        if "max" in self.functions:
            top = values.max(0)
            self._max = top if self._max is None else np.maximum(self._max, top)
        self.count += len(rows)

    def result(self, function: str) -> np.ndarray:
        """(element,) of what was added, as stored bits, rounded to nearest even."""
        value = (self._sum / self.count).astype(np.float32) if function == "mean" else self._max
        if self._dtype == np.uint16:
            return value.astype(ml_dtypes.bfloat16).view(np.uint16)
        return value.astype(self._dtype, copy=False)

    def copy(self) -> Self:
        """A pool that goes on from here; what is added to one is not in the other."""
        return copy(self)  # nothing is changed in place

    @staticmethod
    def bytes(functions: Sequence[str], elements: int) -> int:
        """Memory of one."""
        return elements * (8 * ("mean" in functions) + 4 * ("max" in functions))


class PromptPool:
    """Pool of a prompt's rows, which need not wait in the ring for it.

    check : says why rows (token, element) cannot be those of the ids at the tokens, or None.
    total : of the tokens so far; each is added once, in order, also where it is computed again.
    """

    def __init__(self, functions: Sequence[str], prompt_ids: Sequence[int], check: Check) -> None:
        self.prompt_ids = list(prompt_ids)
        self.check = check
        self.total = Pool(functions)

    @property
    def count(self) -> int:
        return self.total.count

    @property
    def complete(self) -> bool:
        return self.count == len(self.prompt_ids)

    def add(self, tokens: Sequence[int], rows: np.ndarray) -> str | None:
        """Pool rows (token, element) of stored bits. Returns why that cannot be done, or None."""
        if list(tokens) != list(range(self.count, self.count + len(tokens))):
            return f"tokens {self.count} to {tokens[-1]} of the prompt were not all captured in order"
        if fault := self.check([self.prompt_ids[t] for t in tokens], tokens, rows):
            return fault
        self.total.add(rows)
        return None
