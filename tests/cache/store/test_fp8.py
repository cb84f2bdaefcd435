"""The store's fp8 codec: bit for bit the torch reference, bounded in memory, and honest about what it loses."""

import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store import fp8
from hiddenlake.cache.store.commits import Loss
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.fp8 import decode, encode, error

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What may go wrong: signs of zero, ties at scale 1 and between subnormal codes, the ends of every dtype, the largest
# activation that was measured.
HARD = (
    0.0,
    -0.0,
    448,
    464,
    17,
    18,
    27,
    -19,
    2**-10,
    3 * 2**-10,
    2**-6,
    1,
    28288,
    -28288,
    65504,
    3.3e38,
    1e-40,
    2.0**-149,
)


def cut(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Finite values in a dtype, at most its largest."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(np.nan_to_num(values.astype(np.float64)), -largest, largest).astype(dtype)


@st.composite
def rows(draw) -> np.ndarray:
    """(..., width) of any dtype that is taken: hard values and any others, ones with an outlier, some rows absent."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9))
    values = st.sampled_from(HARD) | st.floats(width=32, allow_nan=False, allow_infinity=False)
    array = draw(hnp.arrays(np.float64, shape, elements=values, fill=st.just(1.0)))
    if draw(st.booleans()):
        array *= 10.0 ** draw(hnp.arrays(np.int64, (*shape[:-1], 1), elements=st.integers(-45, 38)))
    taken = cut(array, draw(st.sampled_from((BFLOAT16, np.dtype("<f2"), np.dtype("<f4")))))
    absent = draw(hnp.arrays(np.bool_, shape[:-1], elements=st.booleans(), fill=st.just(False)))
    taken[absent] = np.nan
    return taken


def reference(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kernels/quantize.py in plain torch."""
    import torch

    from hiddenlake.kernels.quantize import quantize_rows

    if values.dtype == BFLOAT16:
        tensor = torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(values)
    return tuple(part.numpy() for part in quantize_rows(tensor))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bits, NaN too."""
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and found.tobytes() == expected.tobytes()


@settings(max_examples=400)
@given(rows())
@example(np.array([[28288, *[1.0] * 575], [0.0] * 576, [448, *[17.0] * 575]], "<f4"))
def test_codec_is_the_reference(values):
    pytest.importorskip("torch")
    codes, scale = encode(values)
    expected, expected_scale = reference(values)
    assert same(codes, expected) and np.array_equal(scale, expected_scale, equal_nan=True)
    assert np.array_equal(codes == fp8.NAN, np.broadcast_to(np.isnan(values).all(-1)[..., None], codes.shape))
    if values.dtype == BFLOAT16:
        again, again_scale = encode(values.view(np.uint16))
        assert same(again, codes) and same(again_scale, scale)


@settings(max_examples=200)
@given(rows())
def test_decode_is_one_multiplication(values):
    codes, scale = encode(values)
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wide = table[codes] * scale[..., None]
    assert np.array_equal(decode(codes, scale), wide, equal_nan=True)
    near = decode(codes, scale, "bfloat16")
    assert near.dtype == BFLOAT16 and np.array_equal(near, wide.astype(BFLOAT16), equal_nan=True)
    absent = np.isnan(scale)
    for name, (bits, dtype, fill) in DTYPES.items():
        back = decode(codes, scale, name)
        assert back.dtype == dtype
        # a row's largest value never overflows on its way back into a type that held it
        if name == "float32" or values.dtype in (dtype, np.float16) or (name, values.dtype) == ("bfloat16", BFLOAT16):
            assert np.isfinite(back[~absent]).all()
        assert (
            back[absent].view(bits).view(f"u{bits.itemsize}") == np.array(fill, bits).view(f"u{bits.itemsize}")
        ).all()


@pytest.mark.parametrize("width", (1, 2, 577, 4096, fp8._BLOCK - 1, fp8._BLOCK, fp8._BLOCK + 1, 100_003))
@pytest.mark.parametrize("dtype", (BFLOAT16, np.dtype("<f2"), np.dtype("<f4")), ids=str)
def test_blocks_leave_no_seam(width, dtype):
    """Rows are worked on some at a time: what comes out is what each row gives alone."""
    n = max(3, 3 * fp8._BLOCK // width // 2)
    generator = np.random.default_rng(width)
    values = cut(generator.standard_normal((n, width)) * 10 ** generator.uniform(-3, 3, (n, 1)), dtype)
    codes, scale = encode(values)
    for i in {0, 1, n // 3, 2 * n // 3, n - 2, n - 1}:
        alone, its_scale = encode(values[i])
        assert same(codes[i], alone) and scale[i] == its_scale
        assert same(decode(codes, scale, "bfloat16")[i], decode(alone, its_scale, "bfloat16"))


def test_rows_may_lie_anyhow():
    """As in a shard's buffer: chunks with gaps between them, axes turned, every other row; nothing has to be copied."""
    buffer = np.random.default_rng(0).standard_normal((4, 3, 2, 6, 40)).astype(np.float32)
    layouts = {
        "gaps": buffer[..., :5, :],
        "turned": buffer.transpose(2, 0, 3, 1, 4),
        "every other": buffer[::2, :, :, ::-1],
        "columns": buffer[..., 3:17],
        "turned columns": buffer.transpose(0, 1, 4, 2, 3),
        "none": buffer[:, :0],
        "one row": buffer[0, 0, 0, 0],
    }
    for name, values in layouts.items():
        tidy = np.ascontiguousarray(values)
        codes, scale = encode(values)
        assert all(same(a, b) for a, b in zip((codes, scale), encode(tidy), strict=True)), name
        if values.ndim > 2:
            turned = (np.asfortranarray(codes), np.asfortranarray(scale))
            assert same(decode(*turned), decode(codes, scale)), name
        found, expected = error(values, codes, scale), error(tidy, codes, scale)
        assert found == Loss(expected.relative, pytest.approx(expected.cosine, rel=1e-12), expected.rows), name


@pytest.mark.parametrize("dtype", (np.dtype("<u2"), np.dtype("<f2"), np.dtype("<f4")), ids=str)
@pytest.mark.parametrize("turned", (False, True), ids=("in order", "turned"))
def test_memory_is_bounded(dtype, turned):
    """20 or 40 MB of rows, of which no copy is made: neither decoded nor as numbers."""
    values = (
        np.ones((40, 64, 4096), "<f4").astype(BFLOAT16).view("<u2") if dtype == "u2" else np.ones((40, 64, 4096), dtype)
    )
    values = values.transpose(1, 0, 2) if turned else values
    codes, scale = encode(values)
    results = {
        encode: (values,), decode: (codes, scale), error: (values, codes, scale),
        lambda c, s: decode(c, s, "bfloat16"): (codes, scale),
    }  # fmt: skip
    for function, arguments in results.items():
        tracemalloc.start()
        result = function(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        kept = result if isinstance(result, tuple) else (result,)
        held = sum(array.nbytes for array in kept if isinstance(array, np.ndarray))
        assert peak - held < (4 if function is error else 1.25) * 2**20, function


def test_error_is_measured():
    generator = np.random.default_rng(0)
    values = (generator.standard_normal((50, 3, 64)) * 10 ** generator.uniform(-3, 3, (50, 3, 1))).astype(np.float32)
    values[7, 1] = np.nan
    values[8, 2] = 0
    codes, scale = encode(values)
    x, y = values.reshape(-1, 64).astype(np.float64), decode(codes, scale).reshape(-1, 64).astype(np.float64)
    rows = [i for i in range(150) if i not in (22, 26)]
    norm = np.linalg.norm
    relative = [norm(x[i] - y[i]) / norm(x[i]) for i in rows]
    cosine = [1 - x[i] @ y[i] / norm(x[i]) / norm(y[i]) for i in rows]
    found = error(values, codes, scale)
    assert found.rows == 149 and found.relative == pytest.approx(max(relative), rel=1e-12)
    assert found.cosine == pytest.approx(sum(cosine) / 149, rel=1e-9)  # the row of zeros lost nothing
    assert 0.01 < found.relative < 1 / 16 and 1e-4 < found.cosine < 1e-3
    assert error(values[:20], codes[:20], scale[:20]) + error(values[20:], codes[20:], scale[20:]) == Loss(
        found.relative, pytest.approx(found.cosine, rel=1e-12), 149
    )


def test_error_of_a_known_row():
    """(448, 17) becomes (448, 16): the tie goes to the even code."""
    values = np.array([[448, 17], [448, -17]], np.float32)
    found = error(values, *encode(values))
    angle = np.arctan2(17, 448) - np.arctan2(16, 448)
    assert found == Loss(pytest.approx(1 / np.hypot(448, 17)), pytest.approx(1 - np.cos(angle), rel=1e-9), 2)
    exact = np.array([[448, 16, -1, 0]], np.float32)
    assert error(exact, *encode(exact)) == Loss(0, 0, 1)


def test_error_of_what_is_not_there():
    values = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    codes, scale = encode(values)
    absent = np.full_like(values, np.nan)
    assert error(absent, *encode(absent)) == Loss() == Loss() + Loss()
    for other in (
        error(absent, codes, scale),
        error(values, *encode(absent)),
        Loss(0.1, 0.1, 4) + error(absent, codes, scale),
    ):
        assert np.isnan(other.relative) and np.isnan(other.cosine)
    lost = error(values, np.zeros_like(codes), scale)
    assert lost == Loss(1, 1, 2)
    assert error(np.zeros_like(values), codes, scale) == Loss(np.inf, 1, 2)


@settings(max_examples=200)
@given(rows())
def test_no_row_loses_much(values):
    """Half a step of 3 bits of mantissa, or of the smallest code, at most: below 1/16 of a row's norm, and a little."""
    found = error(values, *encode(values))
    width = values.shape[-1]
    # The smallest code is 2^-9 of a scale, and amax is 448 of it; for a scale of 2^-140 it is float32's smallest.
    assert found.relative <= 1 / 16 + width**0.5 * 2.0**-10 / 448 + 2**-9
    assert -1e-15 <= found.cosine <= found.relative**2


REFUSED = {
    "rows are float64 of shape": lambda v, c, s: encode(v.astype(np.float64)),
    "rows are int16 of shape": lambda v, c, s: encode(v.astype(np.int16)),
    r"rows are >f4 of shape": lambda v, c, s: encode(v.astype(">f4")),
    r"rows are float32 of shape \(\)": lambda v, c, s: encode(v[0, 0, ...]),
    r"rows are float32 of shape \(2, 0\)": lambda v, c, s: encode(v[:, :0]),
    "codes are int8 of shape": lambda v, c, s: decode(c.view(np.int8), s),
    "their scales float64": lambda v, c, s: decode(c, s.astype(np.float64)),
    r"scales float32 of shape \(1,\)": lambda v, c, s: decode(c, s[:1]),
    r"scales float32 of shape \(2, 1\)": lambda v, c, s: error(v, c, s[:, None]),
    "dtype 'float64': expected bfloat16 or float16 or float32": lambda v, c, s: decode(c, s, "float64"),
    r"rows of shape \(1, 3\) for codes of shape \(2, 3\)": lambda v, c, s: error(v[:1], c, s),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    values = np.ones((2, 3), np.float32)
    codes, scale = encode(values)
    with pytest.raises(BadInputError, match=message):
        REFUSED[message](values, codes, scale)


@pytest.mark.parametrize("dtype", (BFLOAT16, np.dtype("<f2"), np.dtype("<f4")), ids=str)
@pytest.mark.parametrize("bad", ((1, np.nan), (np.inf, 1), (-np.inf, np.nan), (np.inf, -np.inf)), ids=str)
def test_a_row_that_is_partly_finite_is_refused(dtype, bad):
    values = np.ones((3, 2, 2), dtype)
    values[0] = np.nan
    encode(values)
    values[2, 1] = bad
    with pytest.raises(BadInputError, match=r"row \[2, 1\] holds values that are not finite"):
        encode(values.view(np.uint16) if dtype == BFLOAT16 else values)


def test_import_needs_no_torch():
    script = "import sys; import hiddenlake.cache.store.fp8; print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'hiddenlake.cache.store.fp8'" in result.stdout and "'torch'" not in result.stdout
