"""Taps: one custom op per (site, layer), traced into eager, compiled and graph execution alike.

A tap gathers the rows that the row map asks for into its place in the packed rows. It adds hidden and residual
itself, because the next fused norm overwrites both in place.
"""

from collections.abc import Callable

import torch

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.families import Family
from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.hooks import Write, install_hook
from hiddenlake.kernels.gather import gather_rows


@torch.library.custom_op("hiddenlake::tap", mutates_args=("out",))
def tap(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    offset: int,
) -> None:
    """See gather_rows. Opaque to the compiler, so that a graph keeps it."""
    gather_rows(hidden, residual, rows, slots, count, out, offset)


@tap.register_fake
def _(hidden, residual, rows, slots, count, out, offset) -> None:
    return None


Pick = Callable[[torch.Tensor], torch.Tensor]


class TapBuffers:
    """Static buffers that taps read and write, on the model's device.

    rows, slots : (R,) int64, which row of the batch goes to which row of `out`.  count : (1,) int64, how many.
    out : (C, element), packed rows.  firsts : (tap,) int64, the first element of each tap in a row.
    straight : (what takes the wanted rows of a batch, first slot, count) where the slots are consecutive and lie on a
        CPU, else None. Set before each step; read by taps that run eagerly, for which it saves the scattering.
    """

    def __init__(self, max_rows: int, out: torch.Tensor, firsts: torch.Tensor) -> None:
        self.rows = torch.zeros(max_rows, dtype=torch.int64, device=out.device)
        self.slots = torch.zeros(max_rows, dtype=torch.int64, device=out.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=out.device)
        self.out = out
        self.firsts = firsts
        self.straight: tuple[Pick, int, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.rows, self.slots, self.count, self.out, self.firsts))

    def set(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """For the next step: rows, slots (n,) int64."""
        n = len(rows)
        if n > len(self.rows):
            raise RuntimeError(f"a step wants {n} rows, but the tap buffers take {len(self.rows)}")
        if n:
            self.rows[:n].copy_(rows, non_blocking=True)
            self.slots[:n].copy_(slots, non_blocking=True)
        self.count.fill_(n)
        self.straight = None


def install(model: torch.nn.Module, family: Family, table: TapTable, buffers: TapBuffers) -> None:
    """Put the taps into a loaded vLLM model. Must run before it is compiled or graph-captured."""
    for site, layer, offset, width in table.taps():
        install_hook(model, family, site, layer, _writer(buffers, offset, width))


def _writer(buffers: TapBuffers, offset: int, width: int) -> Write:
    def write(hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        if hidden.shape[-1] != width:  # a wider one would run into the next tap's place
            raise CaptureError(
                f"a tap for {width} values a token was given {hidden.shape[-1]}: the model's config names other widths "
                f"than vLLM computes with; correct the config"
            )
        # The op's dispatch costs 20 microseconds on a CPU, more than the copy; a graph needs the op.
        if not torch.compiler.is_compiling() and buffers.straight is not None:
            pick, slot, n = buffers.straight
            target = buffers.out[slot : slot + n, offset : offset + width]
            if residual is None:
                target.copy_(pick(hidden))
            else:
                torch.add(pick(hidden), pick(residual), out=target)
            return
        torch.ops.hiddenlake.tap(hidden, residual, buffers.rows, buffers.slots, buffers.count, buffers.out, offset)

    return write
