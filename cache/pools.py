"""Pools: means and maxima over a span of tokens, computed before anything is stored."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from hiddenlake.cache.store import snapshot


def widen(rows: np.ndarray) -> np.ndarray:
    """Stored bits as float32, exactly: bfloat16 given as uint16, or float32."""
    return snapshot.widen(rows) if rows.dtype == np.uint16 else rows


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 values as stored bits of a dtype, rounded to nearest even."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else values


# (token ids, token indices, rows) -> fault
Check = Callable[[Sequence[int], Sequence[int], np.ndarray], str | None]


class PromptPools:
    """Running mean and maximum of a prompt's rows, which need not wait in the ring for them.

    check : says why rows (token, element) cannot be those of the ids at the tokens, or None.
    count : tokens pooled so far; each is added once, in order, also where it is computed again.
    """

    def __init__(self, functions: Sequence[str], prompt_ids: Sequence[int], check: Check) -> None:
        self.functions = tuple(functions)
        self.prompt_ids = list(prompt_ids)
        self.check = check
        self.count = 0
        self.sum: np.ndarray | None = None
        self.max: np.ndarray | None = None

    @property
    def complete(self) -> bool:
        return self.count == len(self.prompt_ids)

    def add(self, tokens: Sequence[int], rows: np.ndarray) -> str | None:
        """Pool rows (token, element) of stored bits. Returns why that cannot be done, or None."""
        if list(tokens) != list(range(self.count, self.count + len(tokens))):
            return f"tokens {self.count} to {tokens[-1]} of the prompt were not all captured in order"
        if fault := self.check([self.prompt_ids[t] for t in tokens], tokens, rows):
            return fault
        values = widen(rows)
        if "mean" in self.functions:
            self.sum = values.sum(0, dtype=np.float64) + (0 if self.sum is None else self.sum)
        if "max" in self.functions:
            top = values.max(0)
            self.max = top if self.max is None else np.maximum(self.max, top)
        self.count += len(tokens)
        return None

    def pooled(self, function: str, rest: np.ndarray) -> np.ndarray:
        """(element,) float32 over the prompt and further rows (token, element) of stored bits."""
        values = widen(rest)
        if function == "mean":
            return ((self.sum + values.sum(0, dtype=np.float64)) / (self.count + len(rest))).astype(np.float32)
        return np.maximum(self.max, values.max(0)) if len(rest) else self.max


def pool(function: str, rows: np.ndarray) -> np.ndarray:
    """(element,) float32 over rows (token, element) of stored bits."""
    values = widen(rows)
    return values.mean(0, dtype=np.float64).astype(np.float32) if function == "mean" else values.max(0)
