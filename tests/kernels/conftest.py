"""Where kernels run: compiled on CUDA, else interpreted on the CPU."""

from collections.abc import Callable, Iterator
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import torch

from hiddenlake.kernels import gather, logistic, quantize


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """CUDA, or the CPU with every kernel interpreted for as long as the module's tests run."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    # Imported before TRITON_INTERPRET is set: Triton's own functions must stay what other tests expect.
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="no Triton for this platform")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_convert_float", _rounding(interpreter))
        patch.setattr(interpreter.tl, "max", _maximum)
        patch.setattr(interpreter.tl, "sum", _sum)
        for module in (gather, logistic, quantize):
            module._jitted.cache_clear()
        yield torch.device("cpu")
    for module in (gather, logistic, quantize):
        module._jitted.cache_clear()


def _rounding(interpreter: ModuleType) -> Callable:
    """The interpreter's float conversion, but right: it cuts bfloat16 off where hardware rounds to nearest even."""
    convert, tl = interpreter._convert_float, interpreter.tl
    types = {tl.bfloat16: ml_dtypes.bfloat16, tl.float32: np.float32}

    def converted(data: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if source not in types or target not in types:
            return convert(data, source, target, mode)
        with np.errstate(over="ignore", invalid="ignore"):
            return data.view(types[source]).astype(types[target])

    return converted


def _maximum(values: object, axis: int) -> object:
    """tl.max, which is written in Triton, and so was made for the compiler when Triton was imported."""
    from triton import language as tl

    return tl.reduce(values, axis, tl.standard._elementwise_max)  # the interpreter replaces tl.reduce, and knows this


def _sum(values: object, axis: int) -> object:
    """tl.sum, likewise."""
    from triton import language as tl

    return tl.reduce(values, axis, tl.standard._sum_combine)
