"""Gather: the wanted rows of one activation, added, cast and packed into a row buffer in one pass."""

from __future__ import annotations  # the kernel's tl.constexpr, before Triton is imported

import functools
from typing import Any

import torch

BLOCK = 1024  # columns a program: 8 a thread of 4 warps, which is one 16-byte access in a 2-byte type
PROGRAMS = 2048  # about what 132 SMs hold of 128 threads each: a larger grid would only wait, or exit later


def gather_rows(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    offset: int,
) -> None:
    """out[slots[i], offset : offset + W] = hidden[rows[i]] (+ residual[rows[i]]), cast to out's dtype, for i < count.

    hidden, residual : (token, W), float16, bfloat16 or float32, columns contiguous. The sum is rounded once to
        this dtype, as the model's own fused add-and-norm rounds it, and then cast to out's.
    rows, slots : (R,) int64, contiguous, on the same device; no slot twice. Entries from `count` on are padding:
        they may hold anything, are not read from hidden and not written to out.
    count : (1,) int64, at most R. On CUDA it is read by the device alone, so a CUDA graph may replay the call.
    out : (slot, E), float16, bfloat16 or float32, columns contiguous: a token's taps side by side, this one's
        W columns from `offset` on.

    ValueError if shapes, dtypes or devices do not fit; ImportError on CUDA without Triton. On a CPU, IndexError
    for a row outside hidden or a slot outside out, RuntimeError for a count above R. CUDA could raise only by
    waiting: there such a row becomes NaN, such a slot is not written, and the count stops at R.
    """
    _check(hidden, residual, rows, slots, count, out, offset)
    if hidden.is_cuda:
        with torch.cuda.device(hidden.device):  # Triton launches on the current device
            gather_rows_triton(hidden, residual, rows, slots, count, out, offset)
    else:
        gather_rows_reference(hidden, residual, rows, slots, count, out, offset)


def gather_rows_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    offset: int,
) -> None:
    """gather_rows in plain torch, on any device. It reads `count` on the host, so CUDA has to wait."""
    n = int(count)
    rows, slots = rows.narrow(0, 0, n), slots.narrow(0, 0, n)  # narrow and index_copy_ never clip or wrap around
    selected = hidden.index_select(0, rows)
    if residual is not None:
        selected += residual.index_select(0, rows)
    out.narrow(1, offset, hidden.shape[1]).index_copy_(0, slots, selected.to(out.dtype))


def gather_rows_triton(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    offset: int,
) -> None:
    """gather_rows by the Triton kernel: on the current CUDA device, or on a CPU under TRITON_INTERPRET=1.

    It neither allocates nor waits, so it may be captured in a CUDA graph once it was called with the same
    dtypes and widths before (the first call compiles).
    """
    width = hidden.shape[1]
    block = min(BLOCK, 1 << (width - 1).bit_length())
    blocks = -(-width // block)
    grid = (min(len(rows), max(1, PROGRAMS // blocks)), blocks)
    _jitted()[grid](
        hidden, residual, rows, slots, count, out.narrow(1, offset, width), len(hidden), len(out), len(rows), width,
        hidden.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip


@functools.cache
def _jitted() -> Any:
    """The kernel, compiled or interpreted. Triton is imported here, so that a CPU needs only torch."""
    global tl  # the kernel's source is compiled with this module's names
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        message = f"Gathering on CUDA needs Triton, which cannot be imported ({error}): install the package triton."
        raise ImportError(message) from error
    # The numbers of rows differ from call to call; a kernel for every divisibility of them would gain nothing.
    return triton.jit(_gather, do_not_specialize=["n_tokens", "n_slots", "n_rows"])


def _gather(
    hidden, residual, rows, slots, count, out, n_tokens, n_slots, n_rows, width, hidden_stride, residual_stride,
    out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of every num_programs-th wanted row. rows are int64, and so are all addresses."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(tl.load(count), n_rows)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        row = tl.load(rows + i)
        slot = tl.load(slots + i)
        read = columns < tl.where((row >= 0) & (row < n_tokens), width, 0)
        value = tl.load(hidden + row * hidden_stride + columns, mask=read, other=float("nan")).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + row * residual_stride + columns, mask=read, other=0.0).to(tl.float32)
            value = value.to(hidden.dtype.element_ty).to(tl.float32)
        write = columns < tl.where((slot >= 0) & (slot < n_slots), width, 0)
        tl.store(out + slot * out_stride + columns, value.to(out.dtype.element_ty), mask=write)


def _check(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    offset: int,
) -> None:
    """Refuse what the kernel would read or write wrongly: it knows addresses, not tensors."""
    floats, indices = (torch.float16, torch.bfloat16, torch.float32), (rows, slots, count)
    added = hidden if residual is None else residual
    for fits, expected in (
        (hidden.ndim == out.ndim == 2, "hidden and out must be matrices"),
        (hidden.dtype in floats and out.dtype in floats, "hidden and out must be float16, bfloat16 or float32"),
        (added.shape == hidden.shape and added.dtype == hidden.dtype, "residual must have hidden's shape and dtype"),
        (all(t.dtype == torch.int64 for t in indices), "rows, slots and count must be int64"),
        (rows.ndim == 1 and rows.shape == slots.shape, "rows and slots must be vectors of one length"),
        (count.shape == (1,), "count must have one entry"),
        (all(t.device == hidden.device for t in (added, *indices, out)), "all tensors must be on one device"),
        (all(t.stride(-1) == 1 for t in (hidden, added, rows, slots, out)), "the last dimensions must be contiguous"),
        (0 <= offset <= out.shape[-1] - hidden.shape[-1], "out must have the tap's columns from offset on"),
    ):
        if not fits:
            named = {"hidden": hidden, "residual": residual, "rows": rows, "slots": slots, "count": count, "out": out}
            found = ", ".join(
                f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} {t.device} strides {t.stride()}"
                for name, t in named.items()
                if t is not None
            )
            raise ValueError(f"gather_rows: {expected}; found {found}, offset {offset}.")
