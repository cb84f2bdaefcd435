"""Staging: tells the taps which rows a step wants and where they go, and brings them home in one copy."""

import numpy as np
import torch

from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.ring import Ring, runs
from hiddenlake.cache.worker.taps import TapBuffers


class HostStaging:
    """On a CPU the taps write into the ring itself."""

    def __init__(self, buffers: TapBuffers, ring: Ring) -> None:
        self.buffers, self.ring = buffers, ring

    def begin(self, rows: list[int], slots: np.ndarray) -> None:
        """Before the forward pass: row `rows[i]` of the batch shall go to slot `slots[i]` of the ring.

        The first element of each tap is set to NaN before, so that a tap that does not fire leaves NaN, which no
        sample is stored with, and never another token's row.
        """
        parts = runs(slots)
        for _, slot, n in parts:
            self.ring.arena[slot : slot + n].index_fill_(1, self.buffers.firsts, torch.nan)
        self.buffers.set(torch.tensor(rows, dtype=torch.int64), torch.from_numpy(slots))
        if len(parts) == 1 and (not rows or rows[-1] - rows[0] == len(rows) - 1):
            self.buffers.straight = (rows[0], parts[0][1], len(rows))

    def collect(self) -> None:
        """After the forward pass."""

    def mark(self) -> None:
        """A point in time for `wait`."""

    def wait(self, mark: None) -> None:
        """Until the rows of every step collected before the mark are in the ring."""


class DeviceStaging:
    """On a GPU the taps write into one half of a device buffer while the other half's copy is under way."""

    def __init__(self, buffers: TapBuffers, ring: Ring) -> None:
        self.buffers, self.ring = buffers, ring
        self._half = len(buffers.rows)
        self._parity = 0
        self._slots = np.empty(0, np.int64)
        self._stream = torch.cuda.Stream()
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        # what the host writes while the device may still read what it wrote the step before
        self._index = [torch.zeros(2, self._half, dtype=torch.int64, pin_memory=True) for _ in range(2)]

    def begin(self, rows: list[int], slots: np.ndarray) -> None:
        """See HostStaging. Waits for the copy of the step before last, which is done long since."""
        self._parity ^= 1
        self._copied[self._parity].synchronize()
        n = len(rows)
        index = self._index[self._parity]
        index[0, :n] = torch.tensor(rows, dtype=torch.int64)
        index[1, :n] = torch.arange(self._parity * self._half, self._parity * self._half + n)
        self.buffers.set(index[0, :n], index[1, :n])
        self._slots = slots

    def collect(self) -> None:
        """Bring the gathered rows home on a stream of their own, without waiting for the device.

        The first element of each tap is set to NaN behind the copy, so that a tap that does not fire in a later step
        leaves NaN.
        """
        n = len(self._slots)
        if n == 0:
            return
        out = self.buffers.out[self._parity * self._half :][:n]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for place, slot, length in runs(self._slots):
                self.ring.arena[slot : slot + length].copy_(out[place : place + length], non_blocking=True)
            out.index_fill_(1, self.buffers.firsts, torch.nan)
            self._copied[self._parity].record()
        self._slots = self._slots[:0]

    def mark(self) -> "torch.cuda.Event":
        """See HostStaging."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: "torch.cuda.Event") -> None:
        """See HostStaging."""
        mark.synchronize()


def make_staging(
    rows: int, ring_rows: int, table: TapTable, dtype: torch.dtype, device: torch.device
) -> tuple[TapBuffers, HostStaging | DeviceStaging]:
    """The taps' buffers and the staging of one process.

    rows : most rows that one step can want.  ring_rows : of the ring.
    """
    cuda = device.type == "cuda"
    ring = Ring(ring_rows, len(table), dtype, pinned=cuda)
    firsts = torch.tensor([offset for _, _, offset, _ in table.taps()], dtype=torch.int64, device=device)
    if not cuda:
        buffers = TapBuffers(rows, ring.arena, firsts)
        return buffers, HostStaging(buffers, ring)
    out = torch.full((2 * rows, len(table)), torch.nan, dtype=dtype, device=device)
    buffers = TapBuffers(rows, out, firsts)
    return buffers, DeviceStaging(buffers, ring)
