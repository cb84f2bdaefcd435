"""Taps and staging on a GPU: eager and replayed from a CUDA graph, every row comes home bit for bit."""

from random import Random

import numpy as np
import pytest
import torch

from hiddenlake.cache.rows import tap_table
from hiddenlake.cache.worker import staging, taps
from hiddenlake.cache.worker.bits import as_bits

pytestmark = pytest.mark.gpu

LAYERS, TOKENS, STEPS = 8, 256, 150
WIDTHS = {"hidden": 4096, "attn_z": 4096, "mlp_act": 14336}


class Model:
    """Activations that each step writes over, and a tap on each of them.

    A step is as slow as its matrix products, so that the host runs ahead of it and copies lag behind.
    """

    def __init__(self, graph: bool, dtype: torch.dtype) -> None:
        device = torch.device("cuda")
        self.table = tap_table(("resid_post", "mlp_act"), range(LAYERS), WIDTHS, LAYERS)
        self.buffers, self.staging = staging.make_staging(TOKENS, 8 * TOKENS, self.table, dtype, device)
        self.seed = torch.zeros(1, device=device)
        self.load = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        self.taps = [
            (torch.empty(TOKENS, width, device=device, dtype=dtype), width, taps._writer(self.buffers, offset, width))
            for _, _, offset, width in self.table.taps()
        ]
        self.dead: int | None = None
        self.run()
        self.forward = self.run
        if graph:
            torch.cuda.synchronize()
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                self.run()
            self.forward = recorded.replay

    def run(self) -> None:
        for k, (activation, width, write) in enumerate(self.taps):
            torch.mm(self.load, self.load)
            token = torch.arange(TOKENS, device="cuda")[:, None]
            # whole numbers below 256, which every dtype holds exactly
            activation.copy_((token * 7 + torch.arange(width, device="cuda") * 3 + k * 11 + self.seed * 13) % 251)
            if k != self.dead:
                write(activation, activation if k % 2 else None)

    def expected(self, seed: int, row: int) -> np.ndarray:
        """(element,) of one row."""
        parts = []
        for k, (_, width, _) in enumerate(self.taps):
            parts.append((row * 7 + np.arange(width) * 3 + k * 11 + seed * 13) % 251 * (2 if k % 2 else 1))
        return np.concatenate(parts).astype(np.float32)

    def step(self, seed: int, rows: list[int]) -> np.ndarray:
        slots = self.staging.ring.take(len(rows))
        self.staging.begin(rows, slots)
        self.seed.fill_(seed)
        self.forward()
        self.staging.collect()
        return slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_every_row_comes_home(graph, dtype):
    model, chance = Model(graph, dtype), Random(0)
    ring = model.staging.ring
    assert ring.arena.is_pinned()
    waiting = []
    for seed in range(STEPS):
        rows = chance.sample(range(TOKENS), chance.choice([0, 1, TOKENS, chance.randint(0, TOKENS)]))
        waiting.append((seed, rows, model.step(seed, rows), model.staging.mark()))
        while waiting and (ring.free < TOKENS or seed == STEPS - 1):
            past, rows, slots, mark = waiting.pop(0)
            model.staging.wait(mark)
            for row, slot in zip(rows, slots.tolist(), strict=True):
                found = ring.arena[slot].float().numpy()
                assert np.array_equal(found, model.expected(past, row)), (past, row)
            ring.give_back(slots)


def test_a_tap_that_does_not_fire_leaves_nan():
    model = Model(False, torch.bfloat16)
    offsets = [offset for _, _, offset, _ in model.table.taps()]
    for seed in range(6):
        model.dead = 3 if seed >= 2 else None
        slots = model.step(seed, [5, 200])
        model.staging.wait(model.staging.mark())
        bits = as_bits(model.staging.ring.arena)[slots][:, offsets]
        dead = np.arange(len(offsets)) == 3
        assert np.array_equal((bits & 0x7FFF) > 0x7F80, np.broadcast_to(dead & (seed >= 2), bits.shape))
        model.staging.ring.give_back(slots)
