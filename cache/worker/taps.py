"""Taps: one custom op per (layer, site), traced into eager, compiled and graph execution alike.

A tap gathers the rows that the row map asks for into a static buffer. It adds hidden and residual
itself, because the next fused norm overwrites both in place.
"""

from collections.abc import Callable
from typing import Any

import torch

from hiddenlake.cache.families import Family
from hiddenlake.cache.rows import TapTable
from hiddenlake.kernels.gather import gather_rows


@torch.library.custom_op("hiddenlake::tap", mutates_args=("out",))
def tap(
    hidden: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """See gather_rows. Opaque to the compiler, so that a graph keeps it."""
    gather_rows(hidden, residual, rows, count, out)


@tap.register_fake
def _(hidden, residual, rows, count, out) -> None:
    return None


class TapBuffers:
    """Static device buffers that taps read and write.

    rows : (R,) int64, count : (1,) int64, out : (tap, R, hidden) in the stored dtype.
    """

    def __init__(self, n_taps: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.out = torch.full((n_taps, max_rows, width), torch.nan, dtype=dtype, device=device)


def install(model: torch.nn.Module, family: Family, table: TapTable, buffers: TapBuffers) -> None:
    """Put the taps into a loaded vLLM model. Must run before it is compiled or graph-captured."""
    layers = model.get_submodule(family.layers)
    for row, (site, layer) in enumerate(table.pairs):
        _HOOKS[site](layers[layer], family, _writer(buffers, row))


Write = Callable[[torch.Tensor, torch.Tensor | None], None]


def _writer(buffers: TapBuffers, row: int) -> Write:
    out = buffers.out[row]

    def write(hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        torch.ops.hiddenlake.tap(hidden, residual, buffers.rows, buffers.count, out)

    return write


# vLLM calls a layer with (positions, hidden, residual), the attention module with keywords, the MLP with
# its input. A hook that returned something would replace the value, so every hook returns None.


def _resid_pre(layer: torch.nn.Module, family: Family, write: Write) -> None:
    def hook(module: Any, args: tuple) -> None:
        write(args[1], args[2])

    layer.register_forward_pre_hook(hook)


def _resid_post(layer: torch.nn.Module, family: Family, write: Write) -> None:
    def hook(module: Any, args: tuple, output: tuple) -> None:
        write(output[0], output[1])

    layer.register_forward_hook(hook)


def _module_input(path: str) -> Callable[[torch.nn.Module, Family, Write], None]:
    def install_hook(layer: torch.nn.Module, family: Family, write: Write) -> None:
        def hook(module: Any, args: tuple) -> None:
            write(args[0], None)

        layer.get_submodule(getattr(family, path)).register_forward_pre_hook(hook)

    return install_hook


def _module_output(path: str) -> Callable[[torch.nn.Module, Family, Write], None]:
    def install_hook(layer: torch.nn.Module, family: Family, write: Write) -> None:
        def hook(module: Any, args: tuple, output: torch.Tensor) -> None:
            write(output, None)

        layer.get_submodule(getattr(family, path)).register_forward_hook(hook)

    return install_hook


_HOOKS = {
    "embed": _resid_pre,  # the stream entering block 0
    "resid_pre": _resid_pre,
    "attn_out": _module_output("attn"),
    "mlp_in": _module_input("mlp"),
    "mlp_out": _module_output("mlp"),
    "resid_post": _resid_post,
}
