"""fp8: rows as float8_e4m3fn codes and one float32 scale a row, in NumPy alone; bit for bit `kernels/quantize.py`.

Codes are stored as uint8, because Zarr has no name for float8_e4m3fn: its float8_e4m3 is IEEE's, other numbers.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store.commits import Loss
from hiddenlake.cache.store.coverage import DTYPES

NAN = 0x7F  # the code of a NaN

_LARGEST = np.float32(448)  # of float8_e4m3fn
_SMALLEST = np.float32(448 * 2.0**-140)  # the amax under which the scale stays 2^-140: see kernels/quantize.py
_BLOCK = 1 << 16  # values in work at a time: 640 KiB, which stays in the L2 cache; half and twice as many are slower
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_VALUES[[0x7F, 0xFF]] = np.nan  # ml_dtypes' NaN of 0xFF has a sign, which an absent cell has not

_ROWS = (np.dtype("<u2"), np.dtype(ml_dtypes.bfloat16), np.dtype("<f2"), np.dtype("<f4"))
_FLOAT16 = np.dtype("<f2")


def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale): code = value / scale, rounded to float8_e4m3fn, with scale = amax(|row|) / 448.

    rows : (..., width), uint16 (the bits of bfloat16, as the store moves them), bfloat16, float16 or float32.
    codes : (..., width) uint8.  scale : (...,) float32.

    What is rounded how, and what becomes of zeros, tiny values and absent rows, is said in `quantize_rows` of
    kernels/quantize.py. It works in blocks: 1 MiB of memory beside its result, or 16 bytes a column if that is more.

    Raises BadInputError for another dtype or shape, and for a row that is not finite and not all NaN.
    """
    _check_rows(rows)
    codes, scale = np.empty(rows.shape, np.uint8), np.empty(rows.shape[:-1], np.float32)
    work = np.empty((2, max(_BLOCK, rows.shape[-1])), np.uint32)
    for part, part_codes, part_scale in _blocks(rows, codes, scale):
        if not _encode(part, part_codes, part_scale, work):
            raise BadInputError(
                f"row {_not_finite(rows)} holds values that are not finite, and is not NaN throughout: expected "
                f"finite rows, or NaN for what is absent; find out where they come from"
            )
    return codes, scale


def decode(codes: np.ndarray, scale: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """code * scale, in float32, and rounded once more for the other types: to nearest, ties to even.

    codes : (..., width) uint8.  scale : (...,) float32.
    dtype : one of DTYPES. What rows held beyond the largest number of the type that they are decoded to, is infinite.
    Returns (..., width). Absent rows are the NaN that the store fills with. It
    works in blocks, as `encode` does.

    Raises BadInputError if dtypes or shapes do not fit.
    """
    _check_codes(codes, scale)
    if dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    out = np.empty(codes.shape, DTYPES[dtype][1])
    work = np.empty(0 if dtype == "float32" else max(_BLOCK, codes.shape[-1]), np.float32)
    for part, part_scale, part_out in _blocks(codes, scale, out):
        wide = part_out if dtype == "float32" else work[: part.size].reshape(part.shape)
        _decode(part, part_scale, wide)
        if wide is not part_out:
            part_out[...] = wide
    return out


def error(rows: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> Loss:
    """What `rows` lost when they became `codes` and `scale`, in float64, decoded to float32.

    rows, codes, scale : as `encode` takes and gives them. A row that is absent in both is left out. One that is
    absent in one of them makes the errors NaN.

    Raises BadInputError if dtypes or shapes do not fit.
    """
    _check_rows(rows)
    _check_codes(codes, scale)
    if rows.shape != codes.shape:
        raise BadInputError(f"rows of shape {rows.shape} for codes of shape {codes.shape}: expected the same")
    total = Loss()
    work = np.empty(max(_BLOCK, rows.shape[-1]), np.float32)
    for part, part_codes, part_scale in _blocks(rows, codes, scale):
        wide = work[: part.size].reshape(part.shape)
        _decode(part_codes, part_scale, wide)
        total += _error(_numbers(part).astype(np.float64), wide.astype(np.float64))
    return total


def _encode(rows: np.ndarray, codes: np.ndarray, scale: np.ndarray, work: np.ndarray) -> bool:
    """`encode` of one block, (row, width), by the arithmetic of the kernel. Returns whether it could be coded.

    With e the exponent of a quotient, at least -6, codes lie 2^(e-3) apart, as float32 does around 2^(e+20): adding
    2^(e+20) rounds to nearest even, and leaves the number k of steps in the last bits. The code is 8 (e + 6) + k.
    """
    size, power = (buffer[: rows.size].reshape(rows.shape) for buffer in work)
    value = size.view(np.float32)
    amax = _magnitudes(rows, size, value)
    divisor = np.maximum(amax, _SMALLEST) / _LARGEST
    divisor[amax == 0] = 1
    marked = ~np.isfinite(amax)
    if marked.any() and not np.isnan(_numbers(rows[marked])).all():
        return False
    divisor[marked] = np.nan
    scale[...] = divisor
    with np.errstate(invalid="ignore"):  # absent rows
        value /= divisor[:, None]
    np.bitwise_and(size, 0x7F800000, out=power)
    # A row and not a number, with which NumPy's maximum takes twice the time.
    np.maximum(power, np.full(rows.shape[1], (127 - 6) << 23, np.uint32), out=power)
    power += 20 << 23
    value += power.view(np.float32)
    np.right_shift(size, 20, out=power)  # 8 (e + 20 + 127): k is far below
    size += power
    np.copyto(codes, size, casting="unsafe")  # modulo 256, as what is left
    codes -= ((127 - 6 + 20) << 3) % 256
    codes |= _signs(rows)
    codes[marked] = NAN
    return True


def _magnitudes(rows: np.ndarray, size: np.ndarray, value: np.ndarray) -> np.ndarray:
    """|rows| into `value`, which shares its memory with `size`. Returns each row's largest, (row,) float32.

    By their bits: so they are ordered as the numbers are, infinities and then NaN above the rest, and faster.
    """
    if rows.dtype == np.float32:
        np.bitwise_and(rows.view(np.uint32), 0x7FFFFFFF, out=size)
        return size.max(1).view(np.float32)
    magnitude = rows.view(np.uint16) & np.uint16(0x7FFF)
    if rows.dtype == _FLOAT16:
        value[...] = magnitude.view(_FLOAT16)
        return magnitude.max(1).view(_FLOAT16).astype(np.float32)
    np.left_shift(magnitude, 16, out=size, dtype=np.uint32)
    return (magnitude.max(1).astype(np.uint32) << 16).view(np.float32)


def _signs(rows: np.ndarray) -> np.ndarray:
    """0x80 where a value has a sign, (row, width) uint8."""
    bits = rows.view(f"u{rows.itemsize}")
    return (bits >> (8 * rows.itemsize - 8)).astype(np.uint8) & np.uint8(0x80)


def _decode(codes: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """`decode` of one block into `out`, (row, width) float32."""
    np.take(_VALUES, codes, out=out, mode="clip")  # all codes are inside: the other modes copy `out`
    out *= scale[:, None]


def _error(x: np.ndarray, y: np.ndarray) -> Loss:
    """Of rows x, decoded as y, (row, width) float64. 1 - cos by the law of cosines, which keeps small angles."""
    xx, yy, dd = (np.einsum("ij,ij->i", a, a) for a in (x, y, x - y))
    measured = ~(np.isnan(xx) & np.isnan(yy))
    xx, yy, dd = xx[measured], yy[measured], dd[measured]
    if not len(xx):
        return Loss()
    # A row of zeros has neither: it lost nothing where it stayed zero, everything where it did not.
    lost = np.where(dd == 0, 0.0, np.inf)
    relative = np.sqrt(np.divide(dd, xx, out=lost, where=xx != 0))
    norms = np.sqrt(xx * yy)
    angle = dd - (np.sqrt(xx) - np.sqrt(yy)) ** 2
    cosine = np.divide(angle, 2 * norms, out=np.where(dd == 0, 0.0, 1.0), where=norms != 0)
    return Loss(float(relative.max()), float(cosine.mean()), len(xx))


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows of each array, some at a time: matrices, and vectors of the one number a row that scales are.

    All have the same leading axes. Only where all of them lie so that axes can be merged without a copy are rows of
    different places in one block.
    """
    outer = max(arrays, key=lambda array: array.ndim).shape[:-1]
    if len(outer) > 1 and not all(_mergeable(array, len(outer)) for array in arrays):
        for part in zip(*arrays, strict=True):
            yield from _blocks(*part)
        return
    n = int(np.prod(outer, dtype=np.int64))
    width = max(array.shape[-1] for array in arrays if array.ndim > len(outer))
    merged = [array.reshape((n, *array.shape[len(outer) :])) for array in arrays]
    step = max(1, _BLOCK // width)
    for start in range(0, n, step):
        yield tuple(array[start : start + step] for array in merged)


def _mergeable(array: np.ndarray, axes: int) -> bool:
    """Whether the first axes can become one as they lie in memory."""
    shape, strides = array.shape, array.strides
    return all(strides[i] == shape[i + 1] * strides[i + 1] for i in range(axes - 1))


def _check_rows(rows: np.ndarray) -> None:
    if rows.dtype not in _ROWS or rows.ndim == 0 or rows.shape[-1] == 0:
        raise BadInputError(
            f"rows are {rows.dtype} of shape {rows.shape}: expected (..., width) of uint16 (bits of bfloat16), "
            f"bfloat16, float16 or float32, with at least one column"
        )


def _check_codes(codes: np.ndarray, scale: np.ndarray) -> None:
    fits = codes.ndim and codes.shape[-1] and scale.shape == codes.shape[:-1]
    if codes.dtype != np.uint8 or scale.dtype != np.float32 or not fits:
        raise BadInputError(
            f"codes are {codes.dtype} of shape {codes.shape}, their scales {scale.dtype} of shape {scale.shape}: "
            f"expected uint8 (..., width) and float32 (...,), as `encode` gives them"
        )


def _numbers(rows: np.ndarray) -> np.ndarray:
    """Rows as floats, without a copy."""
    return rows.view(ml_dtypes.bfloat16) if rows.dtype == np.uint16 else rows


def _not_finite(rows: np.ndarray) -> list[int]:
    """Index of the first row that is neither finite nor all NaN; there is one."""
    return next(
        list(index)
        for index in np.ndindex(rows.shape[:-1])
        if not np.isfinite(_numbers(rows[index])).all() and not np.isnan(_numbers(rows[index])).all()
    )
