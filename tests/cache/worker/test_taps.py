"""Taps under the compiler: they stay in the graph, and write into their buffer itself. And on a CPU, into the ring."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.worker.ring import Ring
from hiddenlake.cache.worker.staging import HostStaging
from hiddenlake.cache.worker.taps import TapBuffers, _writer

LAYERS, WIDTH, SLOTS = 3, 64, 17


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + hidden
        residual = residual + self.attention(torch.nn.functional.rms_norm(residual, (WIDTH,)))
        return self.mlp(torch.nn.functional.rms_norm(residual, (WIDTH,))), residual


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


@pytest.mark.slow
@pytest.mark.parametrize("functionalization", ["v1", "v2"])  # vLLM turns the second off
def test_a_compiled_tap_writes_into_its_buffer(functionalization):
    """A copy of the buffer for each tap would be right too, and take gigabytes of traffic a step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model()
    buffers = TapBuffers(
        8, torch.full((SLOTS, 2 * LAYERS * WIDTH), torch.nan), torch.arange(0, 2 * LAYERS * WIDTH, WIDTH)
    )
    for i, layer in enumerate(model.layers):
        attention, stream = (_writer(buffers, (2 * i + k) * WIDTH, WIDTH) for k in range(2))
        layer.attention.register_forward_hook(lambda module, args, output, write=attention: write(output, None))
        layer.register_forward_hook(lambda module, args, output, write=stream: write(*output))
    hidden, residual = torch.randn(2, 5, WIDTH)
    buffers.set(torch.tensor([1, 3]), torch.tensor([7, 9]))
    settings = {"enable_auto_functionalized_v2": functionalization == "v2", "force_disable_caches": True}
    with torch.no_grad(), torch._inductor.config.patch(settings):
        model(hidden, residual)
        expected = buffers.out.clone()
        buffers.out.fill_(torch.nan)
        _, [code] = run_and_get_code(torch.compile(model, fullgraph=True, dynamic=True), hidden, residual)
    assert torch.equal(buffers.out.isnan(), expected.isnan())
    torch.testing.assert_close(buffers.out[[7, 9]], expected[[7, 9]], rtol=1e-5, atol=1e-6)
    # a copy would be a buffer of the graph's own
    written = re.findall(r"hiddenlake\.tap\.default\(.*, (\S+), \d+\)", code)
    assert len(written) == 2 * LAYERS and len(set(written)) == 1 and written[0].startswith("arg"), written


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_a_tap_of_another_width_raises(width):
    buffers = TapBuffers(8, torch.full((SLOTS, 2 * WIDTH), torch.nan), torch.arange(0, 2 * WIDTH, WIDTH))
    buffers.set(torch.tensor([1, 3]), torch.tensor([7, 9]))
    with pytest.raises(CaptureError, match=f"for {WIDTH} values a token was given {width}"):
        _writer(buffers, 0, WIDTH)(torch.ones(5, width), None)
    assert buffers.out.isnan().all()


@given(
    rows=st.sets(st.integers(0, 11)).map(sorted),
    taken=st.sets(st.integers(0, SLOTS - 1), max_size=5),
    pairs=st.booleans(),
    dead=st.sampled_from([None, 0, 1]),
)
def test_on_a_cpu_rows_go_where_they_belong(rows, taken, pairs, dead):
    """Whether rows and slots are consecutive or not; and what a dead tap leaves is NaN."""
    ring = Ring(SLOTS, 2 * WIDTH, torch.float32, pinned=False)
    ring.arena.fill_(-1)
    buffers = TapBuffers(12, ring.arena, torch.tensor([0, WIDTH]))
    staging = HostStaging(buffers, ring)
    slots = np.array([slot for slot in range(SLOTS) if slot not in taken][: len(rows)])
    staging.begin(rows, slots)
    activations = torch.randn(2, 2, 12, WIDTH)
    for k, (hidden, residual) in enumerate(activations):
        if k != dead:
            _writer(buffers, k * WIDTH, WIDTH)(hidden, residual if pairs else None)
    expected = torch.full_like(ring.arena, -1)
    for k, (hidden, residual) in enumerate(activations):
        values = hidden + residual if pairs else hidden
        if k != dead:
            expected[slots, k * WIDTH : (k + 1) * WIDTH] = values[rows]
        else:
            expected[slots, k * WIDTH] = torch.nan
    torch.testing.assert_close(ring.arena, expected, rtol=0, atol=0, equal_nan=True)
