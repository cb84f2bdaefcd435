"""Staging: the bounded host memory in which rows wait until the driver knows which positions count."""

import torch

from hiddenlake.cache.worker.taps import TapBuffers


class Staging:
    """A fixed arena of rows on the host, and the one copy a step that fills it.

    arena : (tap, slot, hidden) in the stored dtype, in pinned memory on a GPU machine.
    """

    def __init__(self, buffers: TapBuffers, capacity: int) -> None:
        n_taps, max_rows, width = buffers.out.shape
        self.buffers = buffers
        self.arena = torch.empty(n_taps, capacity, width, dtype=buffers.out.dtype)
        self._free = list(range(capacity - 1, -1, -1))
        self._cuda = buffers.out.is_cuda
        if self._cuda:
            self._block = torch.empty(buffers.out.shape, dtype=buffers.out.dtype, pin_memory=True)
            self._stream = torch.cuda.Stream()
            self._copied = torch.cuda.Event()
        self._pending: torch.Tensor | None = None

    def take(self) -> int | None:
        """A free slot, or None when the arena is full."""
        return self._free.pop() if self._free else None

    def give_back(self, slots: list[int]) -> None:
        """Slots are free again."""
        self._free.extend(slots)

    @property
    def free(self) -> int:
        return len(self._free)

    def begin(self, rows: list[int]) -> None:
        """Before the forward pass: say which rows of the batch the taps shall gather."""
        self.drain()
        if self._cuda:
            # the taps may overwrite `out` only after the last copy has read it
            torch.cuda.current_stream().wait_event(self._copied)
        buffers, n = self.buffers, len(rows)
        if n:
            buffers.rows[:n].copy_(torch.tensor(rows, dtype=torch.int64), non_blocking=True)
        buffers.rows[n:].zero_()
        buffers.count.fill_(n)

    def collect(self, slots: list[int]) -> None:
        """After the forward pass: bring the gathered rows home, without waiting for the device.

        The buffer is filled with NaN behind the copy, so that a tap that does not fire in a later step
        leaves NaN, which no sample is stored with, and never the rows of an earlier one.
        """
        n = len(slots)
        if n == 0:
            return
        out = self.buffers.out[:, :n]
        index = torch.tensor(slots, dtype=torch.int64)
        if not self._cuda:
            self.arena.index_copy_(1, index, out)
            out.fill_(torch.nan)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._block[:, :n].copy_(out, non_blocking=True)
            out.fill_(torch.nan)
            self._copied.record()
        self._pending = index

    def drain(self) -> None:
        """Wait for the last copy and move it into the arena. Does nothing on a CPU."""
        if self._pending is not None:
            self._copied.synchronize()
            self.arena.index_copy_(1, self._pending, self._block[:, : len(self._pending)])
            self._pending = None
