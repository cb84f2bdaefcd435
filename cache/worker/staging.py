"""Staging: tells the taps which rows a step wants and where they go, and brings them home in one copy."""

import operator

import numpy as np
import torch

from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.ring import Ring, runs
from hiddenlake.cache.worker.taps import Pick, TapBuffers


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
        if len(parts) <= 1:
            self.buffers.straight = self._pick(rows), *(parts[0][1:] if parts else (0, 0))

    def _pick(self, rows: list[int]) -> Pick:
        """rows : ascending."""
        n = len(rows)
        if n and rows[-1] - rows[0] != n - 1:
            index = self.buffers.rows[:n]
            return lambda batch: batch.index_select(0, index)
        first = rows[0] if rows else 0
        return operator.itemgetter(slice(first, first + n))

    def collect(self) -> None:
        """After the forward pass."""

    def mark(self) -> None:
        """A point in time for `wait`."""

    def wait(self, mark: None) -> None:
        """Until the rows of every step collected before the mark are in the ring."""


class DeviceStaging:
    """On a GPU the taps write into one half of a device buffer while the other half's copy is under way.

    The host runs ahead of the model's stream, which is the caller's current one, and copies have a stream of their
    own. So the host writes a half's index only when the device has read what was there, the model's stream writes into
    a half only when the copy out of it is done, and a copy begins only when the step before it is done.
    """

    def __init__(self, buffers: TapBuffers, ring: Ring) -> None:
        self.buffers, self.ring = buffers, ring
        self._halves = buffers.out.view(2, len(buffers.rows), buffers.out.shape[1])
        self._parity = 0
        self._slots = np.empty(0, np.int64)
        self._copies = torch.cuda.Stream(buffers.out.device)
        self._read = [torch.cuda.Event(), torch.cuda.Event()]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._rows = torch.zeros(2, len(buffers.rows), dtype=torch.int64).pin_memory()
        self._places = torch.arange(len(buffers.out)).view(2, -1).pin_memory()

    def begin(self, rows: list[int], slots: np.ndarray) -> None:
        """See HostStaging."""
        self._parity ^= 1
        parity, n = self._parity, len(rows)
        self._read[parity].synchronize()  # of the step before last, which is done long since
        index = self._rows[parity, :n]
        index.copy_(torch.tensor(rows, dtype=torch.int64))
        model = torch.cuda.current_stream(self.buffers.out.device)
        model.wait_event(self._copied[parity])
        self.buffers.set(index, self._places[parity, :n])
        self._read[parity].record(model)
        self._slots = slots

    def collect(self) -> None:
        """Bring the gathered rows home, without waiting for the device.

        The first element of each tap is set to NaN behind the copy, so that a tap that does not fire in a later step
        leaves NaN.
        """
        n = len(self._slots)
        if n == 0:
            return
        half = self._halves[self._parity, :n]
        self._copies.wait_stream(torch.cuda.current_stream(half.device))
        with torch.cuda.stream(self._copies):
            for place, slot, length in runs(self._slots):
                self.ring.arena[slot : slot + length].copy_(half[place : place + length], non_blocking=True)
            half.index_fill_(1, self.buffers.firsts, torch.nan)
            self._copied[self._parity].record()
        self._slots = self._slots[:0]

    def mark(self) -> "torch.cuda.Event":
        """See HostStaging."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._copies)
        return event

    def wait(self, mark: "torch.cuda.Event") -> None:
        """See HostStaging."""
        mark.synchronize()


def device_bytes(rows: int, table: TapTable, itemsize: int) -> int:
    """Bytes of the taps' buffers on a GPU, as make_staging makes them."""
    indices = 2 * rows + 1 + len(list(table.taps()))
    return 2 * rows * len(table) * itemsize + indices * 8


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
