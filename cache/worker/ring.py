"""Ring: the bounded host memory in which rows wait until the driver knows which positions count."""

import threading

import numpy as np
import torch


class Ring:
    """Rows on the host, handed out in consecutive runs as long as there are any.

    arena : (capacity, element) in the stored dtype, in pinned memory on a GPU machine: a step's rows come home in one
        copy, and stay where they are until they go into a shard.
    """

    def __init__(self, capacity: int, elements: int, dtype: torch.dtype, pinned: bool) -> None:
        self.arena = torch.empty(capacity, elements, dtype=dtype, pin_memory=pinned)
        self._is_free = np.ones(capacity, bool)
        self._free = capacity
        self._next = 0
        self._lock = threading.Lock()  # rows are given back by the thread that stores them

    @property
    def free(self) -> int:
        return self._free

    def take(self, n: int) -> np.ndarray | None:
        """n free slots, ascending but for one wrap-around, or None where there are fewer.

        The search goes on where the last one ended: slots that were freed one by one have grown together again by the
        time it comes round.
        """
        with self._lock:
            if n > self._free:
                return None
            start = self._next
            if self._is_free[start : start + n].sum() == n:
                slots = np.arange(start, start + n)
            else:
                behind = start + np.flatnonzero(self._is_free[start:])
                slots = behind[:n] if len(behind) >= n else np.append(behind, np.flatnonzero(self._is_free[:start]))[:n]
            self._is_free[slots] = False
            self._free -= n
            if n:
                self._next = (int(slots[-1]) + 1) % len(self._is_free)
            return slots

    def give_back(self, slots: np.ndarray | list[int]) -> None:
        """Slots are free again."""
        with self._lock:
            self._is_free[slots] = True
            self._free += len(slots)


def runs(slots: np.ndarray) -> list[tuple[int, int, int]]:
    """(place, slot, length) of each run of consecutive slots."""
    if not len(slots):
        return []
    starts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 2) != 1)
    lengths = np.diff(starts, append=len(slots))
    return [(int(place), int(slots[place]), int(length)) for place, length in zip(starts, lengths, strict=True)]
