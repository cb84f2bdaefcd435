"""Ring: the bounded host memory in which rows wait until the driver knows which positions count."""

import mmap
import threading
import weakref

import numpy as np
import torch


class Ring:
    """Rows on the host, handed out in consecutive runs as long as there are any.

    arena : (capacity, element) in the stored dtype, in pinned memory on a GPU machine: a step's rows come home in one
        copy, and stay where they are until they go into a shard.
    """

    def __init__(self, capacity: int, elements: int, dtype: torch.dtype, pinned: bool) -> None:
        self.arena = _empty(capacity, elements, dtype)
        if pinned and self.arena.nbytes:
            self._pin()
        self._is_free = np.ones(capacity, bool)
        self._free = capacity
        self._next = 0
        self._touched = 0
        self._free_touched = 0
        self._lock = threading.Lock()  # rows are given back by the thread that stores them

    @property
    def free(self) -> int:
        return self._free

    def take(self, n: int) -> np.ndarray | None:
        """n free slots, ascending but for one wrap-around, or None where there are fewer.

        The search goes on where the last one ended: slots that were freed one by one have grown together again by the
        time it comes round. Memory that was never written is taken only when less than an eighth of the rest is
        free, since the first write to a page costs more than all later ones.
        """
        with self._lock:
            if n > self._free:
                return None
            if self._free_touched < max(n, self._touched // 8):
                grown = min(len(self._is_free), self._touched + max(n, self._touched // 8))
                self._free_touched += grown - self._touched
                self._touched = grown
            start, stop = self._next, self._touched
            if start + n <= stop and self._is_free[start : start + n].all():
                slots = np.arange(start, start + n)
            else:
                behind = start + np.flatnonzero(self._is_free[start:stop])
                slots = behind[:n] if len(behind) >= n else np.append(behind, np.flatnonzero(self._is_free[:start]))[:n]
            self._is_free[slots] = False
            self._free -= n
            self._free_touched -= n
            if n:
                self._next = (int(slots[-1]) + 1) % len(self._is_free)
            return slots

    def give_back(self, slots: np.ndarray | list[int]) -> None:
        """Slots are free again."""
        with self._lock:
            self._is_free[slots] = True
            self._free += len(slots)
            self._free_touched += len(slots)

    def _pin(self) -> None:
        """Let a GPU copy to the arena on its own. torch's pinned memory would be rounded up to a power of two bytes."""
        runtime, address = torch.cuda.cudart(), self.arena.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, self.arena.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


def _empty(capacity: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    size = capacity * elements * dtype.itemsize
    if not size:
        return torch.empty(capacity, elements, dtype=dtype)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # first writes to small pages took a tenth of a capture's time
    return torch.frombuffer(memory, dtype=dtype).view(capacity, elements)


def runs(slots: np.ndarray) -> list[tuple[int, int, int]]:
    """(place, slot, length) of each run of consecutive slots."""
    if not len(slots):
        return []
    starts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 2) != 1)
    lengths = np.diff(starts, append=len(slots))
    return [(int(place), int(slots[place]), int(length)) for place, length in zip(starts, lengths, strict=True)]
