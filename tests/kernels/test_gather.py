"""The gather kernel against its reference, bit for bit, and the reference against a plain loop."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.kernels import gather
from hiddenlake.kernels.gather import gather_rows, gather_rows_reference, gather_rows_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SENTINEL = 7.0
# Any bits overflow and cancel; NumPy says so when the interpreter adds them.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
GARBAGE = (-1, 2**62, 0)  # of padding; 0 is a row and a slot that exist


@dataclass(frozen=True)
class Case:
    """T tokens of width W; n of R rows are wanted; hidden's row has `wider` columns more, out's `offset` and `tail`."""

    T: int
    W: int
    R: int
    n: int
    wider: int = 0
    offset: int = 0
    tail: int = 0

    def __str__(self) -> str:
        return f"T{self.T}-W{self.W}-R{self.R}-n{self.n}-wider{self.wider}-offset{self.offset}-tail{self.tail}"


CASES = (
    Case(1, 1, 1, 1),
    Case(1, 1, 3, 0, wider=1, offset=1, tail=1),
    Case(2, 3, 2, 1, wider=2, offset=3),
    Case(17, 64, 40, 40, offset=64, tail=128),
    Case(300, 576, 257, 256),
    Case(300, 576, 32, 31, wider=5, offset=7, tail=2),
    Case(5, 1000, 9, 1, wider=24, offset=1000),
    Case(64, 4096, 8, 8, offset=3 * 4096, tail=4096),
    Case(300, 4096, 16, 0),
    Case(7, 4096, 3, 2, wider=1, offset=1, tail=1),
)


def tensors(case: Case, dtype: torch.dtype, out_dtype: torch.dtype, residual: bool, seed: int = 0) -> list:
    """The arguments of gather_rows on the CPU: normal numbers, with any bits (NaN, infinite, subnormal) in every third."""
    g = torch.Generator().manual_seed(seed)

    def activation(wider: int) -> torch.Tensor:
        shape = (case.T, case.W + wider)
        bits = torch.randint(-(2**31), 2**31, shape, generator=g).to(integers(dtype)).view(dtype)
        mixed = torch.where(torch.rand(shape, generator=g) < 1 / 3, bits, torch.randn(shape, generator=g).to(dtype))
        return mixed[:, wider : wider + case.W]

    n_slots = case.n + 3
    padding = torch.tensor(GARBAGE * case.R)[: case.R - case.n]
    rows = torch.cat([torch.randint(case.T, (case.n,), generator=g), padding])
    slots = torch.cat([torch.randperm(n_slots, generator=g)[: case.n], padding])
    out = torch.full((n_slots, case.offset + case.W + case.tail), SENTINEL, dtype=out_dtype)
    added = activation(2 * case.wider) if residual else None
    return [activation(case.wider), added, rows, slots, torch.tensor([case.n]), out, case.offset]


def integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


def on(device: torch.device, arguments: list) -> list:
    """A copy of every tensor on the device, strides and all."""
    copies = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            whole = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
            a = whole.clone().to(device).as_strided(a.shape, a.stride(), a.storage_offset())
        copies.append(a)
    return copies


def run(function, device: torch.device, arguments: list) -> torch.Tensor:
    """What `function` leaves in a copy of out, on the CPU."""
    copies = on(device, arguments)
    function(*copies)
    return copies[5].cpu()


def loop(hidden, residual, rows, slots, count, out, offset) -> None:
    """gather_rows, from its definition."""
    for row, slot in zip(rows[: int(count)].tolist(), slots.tolist(), strict=False):
        value = hidden[row].float()
        if residual is not None:
            value = (value + residual[row].float()).to(hidden.dtype).float()
        out[slot, offset : offset + len(value)] = value.to(out.dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, except that one NaN is like another. Says where the first difference is."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    bits = integers(found.dtype)
    differs = (found.view(bits) != expected.view(bits)) & ~(found.isnan() & expected.isnan())
    if differs.any():
        row, column = differs.nonzero()[0].tolist()
        values = f"found {found[row, column].item()!r}, expected {expected[row, column].item()!r}"
        pytest.fail(f"{differs.sum()} of {differs.numel()} differ, first at row {row}, column {column}: {values}")


@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("out_dtype", DTYPES, ids=lambda d: f"to_{str(d)[6:]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_reference(device, case, dtype, out_dtype, residual):
    arguments = tensors(case, dtype, out_dtype, residual)
    expected = run(gather_rows_reference, torch.device("cpu"), arguments)
    assert_same(run(gather_rows_triton, device, arguments), expected)
    if case.n:
        assert not torch.equal(expected, arguments[5])


@pytest.mark.parametrize("case", (Case(300, 14336, 150, 149, offset=14336), Case(40, 1, 2100, 2099)), ids=str)
def test_more_rows_than_programs(device, case):
    """Rows past the grid are done by its programs in turns."""
    arguments = tensors(case, torch.bfloat16, torch.bfloat16, residual=True)
    expected = run(gather_rows_reference, torch.device("cpu"), arguments)
    assert_same(run(gather_rows_triton, device, arguments), expected)


@st.composite
def cases(draw) -> Case:
    r = draw(st.integers(1, 12))
    widths = st.integers(1, 40) | st.sampled_from((1023, 1025, 2049))
    small = st.integers(0, 9)
    return Case(
        draw(st.integers(1, 20)), draw(widths), r, draw(st.integers(0, r)), draw(small), draw(small), draw(small)
    )


@settings(max_examples=200)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 10_000))
def test_kernel_and_reference_are_the_loop(device, case, dtype, out_dtype, residual, seed):
    arguments = tensors(case, dtype, out_dtype, residual, seed)
    expected = run(loop, torch.device("cpu"), arguments)
    assert_same(run(gather_rows_reference, device, arguments), expected)
    assert_same(run(gather_rows_triton, device, arguments), expected)


def test_the_sum_is_rounded_to_the_models_dtype(device):
    """1 + 2^-9 is 1 in bfloat16: a float32 buffer must hold what the model's next layer sees."""
    hidden, residual = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2**-9, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int64)
    arguments = [hidden, residual, index, index, torch.ones(1, dtype=torch.int64), torch.zeros(1, 1), 0]
    for function in (gather_rows_triton, gather_rows_reference):
        assert run(function, device, arguments).item() == 1.0


def test_first_difference_is_named():
    found, expected = torch.zeros(3, 4), torch.zeros(3, 4)
    expected[0, 0] = found[0, 0] = torch.nan
    assert_same(found, expected)
    expected[1, 2] = -0.0
    with pytest.raises(pytest.fail.Exception, match="1 of 12 .* row 1, column 2: found 0.0, expected -0.0"):
        assert_same(found, expected)


def test_the_kernel_marks_what_a_cpu_refuses(device):
    """Indices out of range: an error on a CPU; the kernel cannot raise, so it writes NaN, or nothing."""
    hidden, residual = torch.ones(3, 5), torch.ones(3, 5)
    rows, slots = torch.tensor([0, 3, -1, 2**62, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 4, -1, 5])
    arguments = [hidden, residual, rows[:6], slots[:6], torch.tensor([7]), torch.full((6, 5), SENTINEL), 0]
    found = run(gather_rows_triton, device, arguments)
    assert found[[0, 4]].eq(2.0).all() and found[1:4].isnan().all() and found[5].eq(SENTINEL).all()
    for row, slot, count, error in ((3, 0, 1, IndexError), (-1, 0, 1, IndexError), (0, 5, 1, IndexError),
                                    (0, -1, 1, IndexError), (0, 0, 2, RuntimeError), (0, 0, -1, RuntimeError)):  # fmt: skip
        with pytest.raises(error):
            gather_rows(hidden, residual, torch.tensor([row]), torch.tensor([slot]), torch.tensor([count]),
                        torch.zeros(5, 5), 0)  # fmt: skip


REFUSED = {
    "matrices": {0: lambda a: a[0][0], 1: lambda a: None},
    "hidden and out must be float": {0: lambda a: a[0].double(), 1: lambda a: None},
    "out must be float": {5: lambda a: a[5].to(torch.int32)},
    "residual must have hidden's shape": {1: lambda a: a[1][:, :-1]},
    "shape and dtype": {1: lambda a: a[1].half()},
    "must be int64": {2: lambda a: a[2].int()},
    "one length": {3: lambda a: a[3][:-1]},
    "one entry": {4: lambda a: a[4].repeat(2)},
    "one device": {5: lambda a: a[5].to("meta")},
    r"contiguous; found hidden \(4, 6\) float32 cpu strides \(1, 4\)": {0: lambda a: a[0].T.contiguous().T},
    r"contiguous; .*slots \(3,\) int64 cpu strides \(2,\)": {3: lambda a: a[3].repeat_interleave(2)[::2]},
    "from offset on; .*offset 8": {6: lambda a: 8},
    "from offset on; .*offset -1": {6: lambda a: -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    arguments = tensors(Case(4, 6, 3, 2, offset=5, tail=2), torch.float32, torch.float32, residual=True)
    gather_rows(*arguments)
    for place, change in REFUSED[message].items():
        arguments[place] = change(arguments)
    with pytest.raises(ValueError, match=message):
        gather_rows(*arguments)


def test_triton_is_needed_on_cuda_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gather, "_jitted", gather._jitted.__wrapped__)
    arguments = tensors(Case(4, 6, 3, 2), torch.bfloat16, torch.bfloat16, residual=True)
    assert_same(run(gather_rows, torch.device("cpu"), arguments), run(loop, torch.device("cpu"), arguments))
    with pytest.raises(ImportError, match="install the package triton"):
        gather_rows_triton(*arguments)


def test_import_needs_torch_only():
    script = "import sys, torch; before = set(sys.modules); import hiddenlake.kernels.gather; print(set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "hiddenlake.kernels.gather" in result.stdout and "triton" not in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile it here")
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
def test_compiles_to_16_byte_accesses(capability, residual, tmp_path, monkeypatch):
    """What the interpreter cannot see: the kernel compiles for CUDA, and loads and stores 8 bfloat16 at a time."""
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel = gather._jitted.__wrapped__()
    kinds = {"hidden": "*bf16", "residual": "*bf16" if residual else "constexpr", "rows": "*i64", "slots": "*i64",
             "count": "*i64", "out": "*bf16", "BLOCK": "constexpr"}  # fmt: skip
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    place = kernel.arg_names.index
    constants = {(place("BLOCK"),): gather.BLOCK} | ({} if residual else {(place("residual"),): None})
    aligned = {name for name, kind in kinds.items() if kind != "constexpr"} | {
        "width", "hidden_stride", "residual_stride", "out_stride"}  # fmt: skip
    attributes = {(place(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 1 + residual and ptx.count("st.global.v4.b32") == 1


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    """Capture fails if anything waits; nothing is allocated; a replay reads every input as it is then."""
    case = Case(40, 4096, 16, 16, offset=4096, tail=4096)
    arguments = on(torch.device("cuda"), tensors(case, torch.bfloat16, torch.bfloat16, residual=True))
    gather_rows(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        gather_rows(*arguments)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before
    for n in (3, 0, 16):
        new = tensors(replace(case, n=n), torch.bfloat16, torch.bfloat16, residual=True, seed=n)
        for place in range(5):
            arguments[place].copy_(new[place])
        arguments[5].fill_(SENTINEL)
        graph.replay()
        expected = torch.full_like(arguments[5], SENTINEL).cpu()
        gather_rows_reference(*new[:5], expected, new[6])
        assert_same(arguments[5].cpu(), expected)


@pytest.mark.gpu
def test_a_buffer_of_more_than_2_31_elements():
    out = torch.full((2**16 + 2, 2**15), SENTINEL, dtype=torch.bfloat16, device="cuda")  # 4 GiB
    hidden = torch.randn(2, 64, device="cuda").bfloat16()
    rows, slots = (torch.tensor(x, device="cuda") for x in ([1, 0], [2**16 + 1, 2**16]))
    gather_rows(hidden, None, rows, slots, torch.tensor([2], device="cuda"), out, 2**15 - 64)
    assert torch.equal(out[[2**16 + 1, 2**16], -64:], hidden[[1, 0]])
    assert out[:2].eq(SENTINEL).all() and out[-2:, :-64].eq(SENTINEL).all()
