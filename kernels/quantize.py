"""Quantise: rows as float8_e4m3fn bits and one float32 scale a row, so that a row's largest value becomes 448."""

from __future__ import annotations  # the kernel's tl.constexpr, before Triton is imported

import functools
from typing import Any

import torch

LARGEST = 448.0  # of float8_e4m3fn, "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), table 1
SMALLEST = 448 * 2.0**-140  # the amax under which the scale stays 2^-140
NAN = 0x7F  # the code of a NaN
WHOLE = 16384  # columns that a program keeps in registers, 32 a thread; a wider row is read twice


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale): code = value / scale, rounded to float8_e4m3fn, with scale = amax(|row|) / 448.

    values : (..., W), float16, bfloat16 or float32, columns contiguous. On CUDA, leading axes that cannot be
        merged into one are copied first.
    codes : (..., W) uint8, the bits of torch.float8_e4m3fn: `codes.view(torch.float8_e4m3fn).float()
        * scale[..., None]` decodes them. Contiguous, on values' device.
    scale : (...,) float32.

    Divided in float32 (IEEE), rounded to nearest, ties to even, subnormal codes included. No value of a finite row
    needs saturation: a quotient is at most 448 (1 + 2^-9), and up to 464 rounds to 448.

    - A row of zeros has the scale 1; zeros keep their sign.
    - Where amax / 448 would be below 2^-140, the scale is 2^-140. A smaller one would have too few bits left to
        keep quotients below 464, or be 0; with it the smallest float32, 2^-149, is the smallest code, 2^-9, so that
        a row that is not zero never becomes zero.
    - A row of NaN, which is how an absent cell is stored, has NaN codes (0x7F) and a NaN scale.

    ValueError if the shape or the dtype does not fit; ImportError on CUDA without Triton. On a CPU also ValueError
    for a row that holds finite values beside NaN or infinite ones, or infinite ones only. CUDA could raise only by
    waiting: there such a row becomes one of NaN.
    """
    _check(values)
    if values.is_cuda:
        with torch.cuda.device(values.device):  # Triton launches on the current device
            return quantize_rows_triton(values)
    codes, scale = quantize_rows_reference(values)
    marked = scale.isnan()  # of rows that were finite, nothing is read again
    wrong = marked.clone()
    wrong[marked] = ~values[marked].isnan().all(-1)
    if wrong.any():
        raise ValueError(
            f"quantize_rows: row {wrong.nonzero()[0].tolist()} holds values that are not finite, and is not NaN "
            f"throughout; expected finite rows, or NaN for what is absent: find out where they come from."
        )
    return codes, scale


def quantize_rows_reference(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows in plain torch, on any device. A row that is not finite becomes one of NaN."""
    wide = values.float()
    amax = wide.abs().amax(-1)
    # A tensor, not a number: torch multiplies by the reciprocal of a number on CUDA, which rounds otherwise.
    scale = amax.clamp(min=SMALLEST) / torch.full_like(amax, LARGEST)
    scale = torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), scale, torch.nan))
    codes = (wide / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(scale.isnan()[..., None], NAN), scale  # a NaN's sign is nobody's decision


def quantize_rows_triton(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows by the Triton kernel: on the current CUDA device, or on a CPU under TRITON_INTERPRET=1.

    A row that is not finite becomes one of NaN. It does not wait, so it may be captured in a CUDA graph once it was
    called with the same dtype and width before (the first call compiles).
    """
    width = values.shape[-1]
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scale = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    rows = values.reshape(-1, width)
    if len(rows):
        block = min(WHOLE, 1 << (width - 1).bit_length())
        _jitted()[(len(rows),)](
            rows, codes, scale, width, rows.stride(0),
            BLOCK=block, CHUNKS=-(-width // block), num_warps=min(16, max(1, block // 1024)),
        )  # fmt: skip
    return codes, scale


@functools.cache
def _jitted() -> Any:
    """The kernel, compiled or interpreted. Triton is imported here, so that a CPU needs only torch."""
    global tl  # the kernel's source is compiled with this module's names
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        message = f"Quantising on CUDA needs Triton, which cannot be imported ({error}): install the package triton."
        raise ImportError(message) from error
    return triton.jit(_quantize)


def _quantize(values, codes, scale, width, stride, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """One program: one row, kept in registers where it is one chunk.

    Without its sign a float is ordered as its bits are, infinities and NaN above the rest.

    Rounded by arithmetic, since only compute capability 8.9 and later converts. With e the quotient's exponent, at
    least -6, codes lie 2^(e-3) apart, as float32 does around 2^(e+20): adding 2^(e+20) rounds to nearest even, and
    leaves the number k of steps in the last bits. The code is 8 (e + 6) + k.
    """
    row = tl.program_id(0).to(tl.int64)
    values += row * stride
    codes += row * width
    columns = tl.arange(0, BLOCK)
    value = tl.load(values + columns, mask=columns < width, other=0.0).to(tl.float32)
    amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    for chunk in range(1, CHUNKS):
        place = chunk * BLOCK + columns
        value = tl.load(values + place, mask=place < width, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    finite = amax < 0x7F800000
    divisor = tl.maximum(amax, 448 << 9).to(tl.float32, bitcast=True)  # 448 * 2^9 times 2^-149: SMALLEST
    divisor = tl.where(amax == 0, 1.0, tl.div_rn(divisor, 448.0))
    tl.store(scale + row, tl.where(finite, divisor, float("nan")))
    for chunk in range(CHUNKS):
        place = chunk * BLOCK + columns
        if CHUNKS > 1:
            value = tl.load(values + place, mask=place < width, other=0.0).to(tl.float32)
        quotient = tl.div_rn(value, divisor).to(tl.int32, bitcast=True)
        size = quotient & 0x7FFFFFFF
        power = tl.maximum(size & 0x7F800000, (127 - 6) << 23) + (20 << 23)  # the bits of 2^(e+20)
        steps = (size.to(tl.float32, bitcast=True) + power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        code = steps - power + (power >> 20) - ((127 - 6 + 20) << 3)
        code = tl.where(finite, code | ((quotient >> 24) & 0x80), 0x7F)
        tl.store(codes + place, code.to(tl.uint8), mask=place < width)


def _check(values: torch.Tensor) -> None:
    """Refuse what the kernel would read wrongly: it knows addresses, not tensors."""
    for fits, expected in (
        (values.dtype in (torch.float16, torch.bfloat16, torch.float32), "values must be float16, bfloat16 or float32"),
        (values.ndim > 0 and values.shape[-1] > 0, "rows must have a last axis, and it columns"),
        (values.ndim > 0 and values.stride(-1) == 1, "the last dimension must be contiguous"),
    ):
        if not fits:
            found = f"values {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')} {values.device}"
            raise ValueError(f"quantize_rows: {expected}; found {found} strides {values.stride()}.")
