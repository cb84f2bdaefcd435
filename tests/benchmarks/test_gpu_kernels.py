"""Benchmarks of the kernels, as far as they go without a GPU: their checks find what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def quantize():
    """The benchmark, not the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GPU)
        import quantize

        yield quantize
        sys.modules.pop("quantize")


def test_a_wrong_bit_is_found(quantize):
    case = quantize.Case("small", 130, 96)
    values = quantize.make(case, "cpu")
    codes, scale = quantize.quantize.quantize_rows(values)
    assert scale.isnan().sum() == 3 and (codes.view(130, 96) == 0x7E).any()
    assert case.bytes == sum(t.numel() * t.element_size() for t in (values, codes, scale))
    quantize.check(case, values, codes, scale)
    codes[70, 5] ^= 1
    with pytest.raises(SystemExit, match="small: wrong at row 70, column 5: 0x.., expected 0x"):
        quantize.check(case, values, codes, scale)
    codes[70, 5] ^= 1
    scale[2] = scale[2].nextafter(torch.tensor(9.0))
    with pytest.raises(SystemExit, match="wrong scale of row 2"):
        quantize.check(case, values, codes, scale)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ("gather", "quantize"))
def test_without_a_gpu_it_says_so(name):
    result = subprocess.run([sys.executable, GPU / f"{name}.py", "--quick"], capture_output=True, text=True)
    assert result.returncode == 1 and "needs a CUDA device, and torch sees none" in result.stderr
