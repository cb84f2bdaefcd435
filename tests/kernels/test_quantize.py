"""The quantise kernel against its reference and the store's codec, bit for bit, and these against a definition."""

import subprocess
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.store import fp8
from hiddenlake.kernels import quantize
from hiddenlake.kernels.quantize import quantize_rows, quantize_rows_reference, quantize_rows_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# NumPy says so when the interpreter divides what is infinite.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
# Codes 0 to 0x7E, from the format: 4 bits of exponent with bias 7, none for infinity, 3 bits of mantissa.
VALUES = np.array([(c % 8 + 8 * (c >= 8)) * 2.0 ** (max(c // 8, 1) - 7 - 3) for c in range(0x7F)])
# Rows made of one number and its like, where something may go wrong. 28288 is the largest that was measured.
HARD = ("zeros", "minus zeros", "absent", "ties", "outlier", "subnormal", "smallest", "largest", "powers of two")


@dataclass(frozen=True)
class Case:
    """N rows of width W, cut out of rows that are `wider` columns wider."""

    N: int
    W: int
    wider: int = 0

    def __str__(self) -> str:
        return f"N{self.N}-W{self.W}-wider{self.wider}"


CASES = (
    Case(1, 1), Case(3, 1, wider=1), Case(0, 5), Case(12, 2), Case(10, 3, wider=5), Case(11, 64), Case(9, 577),
    Case(13, 1000, wider=24), Case(9, 4096), Case(3, 14336), Case(2, 16384), Case(9, 16385, wider=3), Case(2, 40001),
)  # fmt: skip


def random_rows(case: Case, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows on the CPU: hard ones in turn, between rows of any finite bits and normal rows of any size."""
    g = torch.Generator().manual_seed(seed)
    shape = (case.N, case.wider + case.W)
    limits = torch.finfo(dtype)
    bits = torch.randint(-(2**31), 2**31, shape, generator=g).to(integers(dtype)).view(dtype)
    rows = bits.nan_to_num(1.0, limits.max, limits.min)
    sizes = 10 ** (torch.rand(case.N, 1, generator=g) * 80 - 42)
    normal = (torch.randn(shape, generator=g) * sizes).to(dtype).nan_to_num(1.0, limits.max, limits.min)
    rows[1::3] = normal[1::3]
    for n in range(0, case.N, 3):
        rows[n] = hard(HARD[n // 3 % len(HARD)], rows[n].clone(), g)
    return rows[:, case.wider :]


def hard(name: str, row: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """A row of the width and the dtype of `row`, whose values may be used."""
    limits = torch.finfo(row.dtype)
    random = torch.randint(0, 200, row.shape, generator=g)
    if name == "absent":
        return torch.full_like(row, torch.nan)
    if name == "ties":  # the scale is 1: every value lies halfway between two codes
        values = torch.from_numpy((VALUES[:-1] + VALUES[1:]) / 2)[random % 126]
        values[0::2] *= -1
        values[-1] = 448
    else:
        values = {
            "zeros": torch.zeros(len(row)),
            "minus zeros": torch.full((len(row),), -0.0),
            "outlier": torch.ones(len(row)),
            "subnormal": (random - 100).double() * limits.smallest_normal * limits.eps,
            "smallest": (random % 3 - 1).double() * limits.smallest_normal * limits.eps,
            "largest": row.double() / 3,
            "powers of two": 2.0 ** (random % 20 - 10).double(),
        }[name]
        if name in ("outlier", "largest"):
            values[len(row) // 2] = 28288 if name == "outlier" else limits.min
    return values.to(row.dtype)


def integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


def definition(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows, from its definition: the nearest code of every quotient, of two the even one, found by distance."""
    x = values.float().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        amax = np.abs(x).max(-1)
        scale = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(448), np.float32(2.0**-140)))
        quotient = np.abs(x / scale[..., None]).astype(np.float64)
    halfway = (VALUES[:-1] + VALUES[1:]) / 2  # exact, as quotients are
    below, at_most = (np.searchsorted(halfway, quotient, side) for side in ("left", "right"))
    codes = np.where((below != at_most) & (below % 2 == 1), at_most, below) | np.where(np.signbit(x), 0x80, 0)
    codes = np.where(np.isnan(amax)[..., None], 0x7F, codes)
    return torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(scale)


def codec(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The store's, in NumPy."""
    bits = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
    return tuple(torch.from_numpy(array) for array in fp8.encode(bits))


def on(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """A copy on the device, strides and all."""
    whole = values.as_strided((values.untyped_storage().nbytes() // values.element_size(),), (1,), 0)
    return whole.clone().to(device).as_strided(values.shape, values.stride(), values.storage_offset())


def run(function, device: torch.device, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = function(on(device, values))
    return codes.cpu(), scale.cpu()


def decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As the docstring says it, float32."""
    return codes.view(torch.float8_e4m3fn).float() * scale[..., None]


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal bits, except that one NaN scale is like another. Says where the first difference is."""
    for name, a, b in zip(("code", "scale"), found, expected, strict=True):
        assert a.dtype == b.dtype == (torch.uint8 if name == "code" else torch.float32) and a.shape == b.shape
    (codes, scale), (right, right_scale) = found, expected
    differs = (scale.view(torch.int32) != right_scale.view(torch.int32)) & ~(scale.isnan() & right_scale.isnan())
    if differs.any():
        row = differs.nonzero()[0].tolist()
        at = tuple(row)
        pytest.fail(f"scale of row {row}: found {scale[at].item()!r}, expected {right_scale[at].item()!r}")
    differs = codes != right
    if differs.any():
        *row, column = at = differs.nonzero()[0].tolist()
        values = f"found {codes[tuple(at)].item():#04x}, expected {right[tuple(at)].item():#04x}"
        pytest.fail(f"{differs.sum()} of {differs.numel()} differ, first at row {row}, column {column}: {values}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_reference(device, case, dtype):
    values = random_rows(case, dtype)
    expected = quantize_rows_reference(values)
    assert_same(run(quantize_rows_triton, device, values), expected)
    assert_same(run(quantize_rows, device, values), expected)
    assert_same(codec(values), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(device, name, dtype):
    g = torch.Generator().manual_seed(0)
    row = torch.randn(1, 300, generator=g).to(dtype)
    values = hard(name, row[0], g)[None]
    expected = definition(values)
    for function in (quantize_rows_reference, quantize_rows_triton, codec):
        assert_same(run(function, torch.device("cpu") if function is codec else device, values), expected)
    if name == "absent":
        assert expected[0].eq(0x7F).all() and expected[1].isnan().all()
    elif name in ("zeros", "minus zeros"):
        assert expected[0].eq(0x80 if name == "minus zeros" else 0).all() and expected[1].eq(1).all()
    elif name == "outlier":
        assert decoded(*expected).unique().tolist() == [pytest.approx(1, 1 / 16), pytest.approx(28288, 1e-6)]
    elif name in ("subnormal", "smallest"):
        assert (expected[1] == 2.0**-140) == (
            dtype == torch.float32 or (dtype == torch.bfloat16 and name == "smallest")
        )
        assert torch.equal(decoded(*expected) == 0, values == 0)


@st.composite
def cases(draw) -> Case:
    widths = st.integers(1, 40) | st.sampled_from((1023, 1025, 2049))
    return Case(draw(st.integers(0, 30)), draw(widths), draw(st.integers(0, 9)))


@settings(max_examples=100)
@given(cases(), st.sampled_from(DTYPES), st.integers(0, 10_000))
def test_kernel_reference_and_codec_are_the_definition(device, case, dtype, seed):
    values = random_rows(case, dtype, seed)
    expected = definition(values)
    assert_same(run(quantize_rows_reference, device, values), expected)
    assert_same(run(quantize_rows_triton, device, values), expected)
    assert_same(codec(values), expected)


def test_the_format_is_torchs_and_that_of_ml_dtypes():
    both = np.concatenate([VALUES, [np.nan], -VALUES, [np.nan]])
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), both, equal_nan=True)
    assert np.array_equal(torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy(), both, equal_nan=True)


def test_every_code_comes_back(device):
    """All 254 codes that are not NaN, at scales from the smallest to the largest."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).repeat(6, 1)
    scale = torch.tensor(
        [2.0**-140, 2.0**-126, 1e-3, 1.0, 3.0, float(np.float32(2.0**128 - 2.0**104) / np.float32(448))]
    )
    values = decoded(codes, scale)
    assert values.isfinite().all()
    for function in (quantize_rows_reference, quantize_rows_triton):
        found, found_scale = run(function, device, values)
        assert_same((found, torch.ones(6)), (codes, torch.ones(6)))
        assert torch.allclose(found_scale, scale, rtol=2**-23, atol=0)


def magnitudes() -> torch.Tensor:
    """(row, 1) float32: every positive finite bfloat16 and float16, the smallest million float32, the largest million."""
    halves = [torch.arange(1, 2**15, dtype=torch.int16).view(dtype).float() for dtype in DTYPES[:2]]
    ends = [
        torch.arange(a, b, dtype=torch.int32).view(torch.float32)
        for a, b in ((1, 2**20), (2139095040 - 2**20, 2139095040))
    ]
    every = torch.cat([*halves, *ends])
    return every[every.isfinite(), None]


def test_a_finite_row_has_finite_codes():
    """Whatever its largest value is: it becomes 448, or where the scale cannot be smaller, its nearest code."""
    values = magnitudes()
    codes, scale = quantize_rows(values)
    assert scale.isfinite().all() and scale.min() == 2.0**-140
    assert codes[scale > 2.0**-140].eq(0x7E).all()
    back = decoded(codes, scale)
    assert back.isfinite().all() and ((back - values).abs() <= values / 16).all()
    assert codes.min() == 1  # of 2^-149; nothing becomes zero
    assert_same(codec(values), (codes, scale))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_the_largest_value_of_a_row_comes_back(dtype):
    """In the row's own 2-byte dtype, wherever that has all its bits."""
    values = torch.arange(1, 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite() & (values.float() >= 448 * 2.0**-126), None]
    assert torch.equal(decoded(*quantize_rows(values)).to(dtype), values)


@settings(max_examples=100)
@given(cases(), st.sampled_from(DTYPES), st.integers(0, 10_000))
def test_no_value_moves_by_more_than_half_a_step(case, dtype, seed):
    values = random_rows(case, dtype, seed)
    codes, scale = quantize_rows(values)
    lost = (decoded(codes, scale).double() - values.double()).abs()
    # Half of 3 bits of mantissa, or of the smallest step; 2^-22 for the roundings of float32, 2^-149 is its smallest.
    bound = torch.maximum(values.double().abs() / 16, scale[:, None].double() * 2**-10) * (1 + 2**-9) + 2.0**-149
    absent = scale.isnan()
    assert torch.equal(absent, values.isnan().all(-1)) and lost[absent].isnan().all()
    assert (lost[~absent] <= bound[~absent]).all()


@pytest.mark.parametrize("shape", ((7,), (2, 3, 7), (1, 0, 7), (2, 2, 2, 7)), ids=str)
def test_leading_axes(device, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = (
        definition(values) if values.numel() else (torch.empty(shape, dtype=torch.uint8), torch.empty(shape[:-1]))
    )
    for function in (quantize_rows_reference, quantize_rows_triton, quantize_rows):
        assert_same(run(function, device, values), expected)
    if values.ndim > 2 and values.numel():
        turned = values.transpose(0, 1)
        for function in (quantize_rows_reference, quantize_rows_triton, quantize_rows, codec):
            cpu = torch.device("cpu")
            assert_same(run(function, cpu if function is codec else device, turned), definition(turned.contiguous()))


def test_first_difference_is_named():
    codes, scale = torch.zeros(3, 4, dtype=torch.uint8), torch.tensor([1.0, torch.nan, 2.0])
    assert_same((codes, scale), (codes.clone(), scale.clone()))
    other = codes.clone()
    other[1, 2] = 0x80
    with pytest.raises(pytest.fail.Exception, match=r"1 of 12 .* row \[1\], column 2: found 0x00, expected 0x80"):
        assert_same((codes, scale), (other, scale))
    with pytest.raises(pytest.fail.Exception, match=r"scale of row \[2\]: found 2.0, expected 3.0"):
        assert_same((codes, scale), (codes, torch.tensor([1.0, torch.nan, 3.0])))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_kernel_marks_what_a_cpu_refuses(device, dtype):
    """Rows that are partly finite: an error on a CPU; the kernel cannot raise, so the row becomes NaN."""
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor([[1, 2, 3], [nan, nan, nan], [1, nan, 2], [1, 2, inf], [-inf, nan, nan], [-inf, inf, inf]]).to(
        dtype
    )
    for function in (quantize_rows_triton, quantize_rows_reference):
        codes, scale = run(function, device, rows)
        assert codes[1:].eq(0x7F).all() and scale[1:].isnan().all()
        assert_same((codes[:1], scale[:1]), definition(rows[:1]))
    assert_same(quantize_rows(rows[:2]), definition(rows[:2]))
    for bad in range(2, 6):
        with pytest.raises(ValueError, match=r"row \[0, 2\] holds values that are not finite"):
            quantize_rows(rows[[0, 1, bad, 5]][None])


REFUSED = {
    "must be float16, bfloat16 or float32; found values .* float64": lambda: torch.ones(2, 3).double(),
    "must be .*; found values .* uint8": lambda: torch.ones(2, 3, dtype=torch.uint8),
    r"a last axis, and it columns; found values \(\)": lambda: torch.tensor(1.0),
    r"a last axis, and it columns; found values \(2, 0\)": lambda: torch.ones(2, 0),
    r"contiguous; found values \(3, 2\) float32 cpu strides \(1, 3\)": lambda: torch.ones(2, 3).T,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(REFUSED[message]())


def test_triton_is_needed_on_cuda_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(quantize, "_jitted", quantize._jitted.__wrapped__)
    values = random_rows(Case(3, 6), torch.bfloat16)
    assert_same(quantize_rows(values), definition(values))
    with pytest.raises(ImportError, match="install the package triton"):
        quantize_rows_triton(values)


def test_import_needs_torch_only():
    script = "import sys, torch; before = set(sys.modules); import hiddenlake.kernels.quantize; print(set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "hiddenlake.kernels.quantize" in result.stdout and "triton" not in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile it here")
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("chunks", (1, 2), ids=("registers", "read-twice"))
def test_compiles_to_16_byte_accesses(capability, chunks, tmp_path, monkeypatch):
    """What the interpreter cannot see: 16 bytes an access, IEEE division, no subnormal flushed, and one read if it fits."""
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tl, "max", tl.standard.max)  # which `device` may have replaced
    kernel = quantize._jitted.__wrapped__()
    kinds = {"values": "*bf16", "codes": "*u8", "scale": "*fp32", "BLOCK": "constexpr", "CHUNKS": "constexpr"}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    place = kernel.arg_names.index
    constants = {(place("BLOCK"),): quantize.WHOLE, (place("CHUNKS"),): chunks}
    attributes = {(place(name),): [["tt.divisibility", 16]] for name in signature if signature[name] != "constexpr"}
    source = ASTSource(kernel, signature, constants, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16}).asm["ptx"]
    a_thread = quantize.WHOLE // (16 * 32)
    reads = {1: 1, 2: 3}[chunks]  # of one chunk in registers; else the first, the others in a loop, all in a loop
    assert ptx.count("ld.global.v4.b32") == reads * a_thread * 2 // 16
    assert ptx.count("st.global.v4.b32") == a_thread // 16
    assert ptx.count("div.rn.f32") == a_thread + 1 and ".ftz" not in ptx and "div.full" not in ptx


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    """Capture fails if anything waits; a replay reads the values as they are then."""
    values = random_rows(Case(30, 4096), torch.bfloat16).cuda()
    quantize_rows(values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scale = quantize_rows(values)
    for seed in range(1, 4):
        new = random_rows(Case(30, 4096), torch.bfloat16, seed)
        values.copy_(new)
        graph.replay()
        assert_same((codes.cpu(), scale.cpu()), quantize_rows_reference(new))


@pytest.mark.gpu
def test_more_than_2_31_values():
    values = torch.zeros(2**19 + 1, 2**12, dtype=torch.bfloat16, device="cuda")  # 4 GiB
    values[-1] = torch.randn(2**12, device="cuda").bfloat16()
    codes, scale = quantize_rows(values)
    assert_same((codes[-1].cpu(), scale[-1].cpu()), definition(values[-1].cpu()))
    assert not codes[:-1].any() and scale[:-1].eq(1).all()
