"""Staging on a GPU, without one: every row comes home, whatever the order in which streams and host get on."""

from random import Random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.worker.ring import Ring
from hiddenlake.cache.worker.staging import DeviceStaging
from hiddenlake.cache.worker.taps import TapBuffers, _writer

from . import test_recorder
from .lazy_device import LazyDevice

WIDTHS = (3, 5, 4)
OFFSETS = (0, 3, 8)
MAX_ROWS, TOKENS, SLOTS = 6, 9, 40


class Model:
    """Taps on activations that every step writes over, and a ring for what they leave.

    wrong : what was found in the ring that did not belong there.
    """

    def __init__(self, device: LazyDevice, dead: int | None = None) -> None:
        out = torch.full((2 * MAX_ROWS, sum(WIDTHS)), torch.nan)
        self.buffers = TapBuffers(MAX_ROWS, out, torch.tensor(OFFSETS))
        self.activations = [torch.zeros(TOKENS, width) for width in WIDTHS]
        device.own(*self._tensors(), *self.activations)
        self.ring = Ring(SLOTS, sum(WIDTHS), torch.float32, pinned=False)
        self.ring.arena.fill_(-1)
        self.staging = DeviceStaging(self.buffers, self.ring)
        self.write = [_writer(self.buffers, offset, width) for offset, width in zip(OFFSETS, WIDTHS, strict=True)]
        self.dead = dead
        self.expected: dict[int, torch.Tensor] = {}
        self.wrong: list[int] = []

    def _tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self.buffers).values() if isinstance(value, torch.Tensor)]

    def step(self, rows: list[int], seed: int) -> np.ndarray:
        """Returns the slots in which the rows will be."""
        slots = self.ring.take(len(rows))
        self.staging.begin(rows, slots)
        values = [
            torch.from_numpy(np.random.default_rng([seed, k]).random((TOKENS, w), np.float32))
            for k, w in enumerate(WIDTHS)
        ]
        for k, (activation, value, write) in enumerate(zip(self.activations, values, self.write, strict=True)):
            activation.copy_(value, non_blocking=True)
            if k != self.dead:
                write(activation, None)
        self.staging.collect()
        for row, slot in zip(rows, slots.tolist(), strict=True):
            self.expected[slot] = torch.cat([value[row] for value in values])
        return slots

    def check(self, slots: list[int]) -> None:
        """The rows of steps that were waited for."""
        for slot in slots:
            self.wrong += [slot] if not torch.equal(self.ring.arena[slot], self.expected[slot]) else []


def run(model: Model, chance: Random, steps: int) -> None:
    """Steps, and waits for some of them while others are under way; slots are used again."""
    held: list[int] = []
    marks: list[tuple[object, list[int]]] = []
    for k in range(steps):
        rows = chance.sample(range(TOKENS), chance.choice([0, 1, MAX_ROWS, chance.randint(0, MAX_ROWS)]))
        if len(rows) <= model.ring.free:
            held += model.step(rows, k).tolist()
        if chance.random() < 0.4:
            chance.shuffle(held)
            marks.append((model.staging.mark(), [held.pop() for _ in range(chance.randint(0, len(held)))]))
        while marks and (chance.random() < 0.4 or model.ring.free < MAX_ROWS):
            mark, slots = marks.pop(0)
            model.staging.wait(mark)
            model.check(slots)
            model.ring.give_back(slots)
    model.staging.wait(model.staging.mark())
    for slots in (held, *(slots for _, slots in marks)):
        model.check(slots)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 25), eagerness=st.sampled_from([0.0, 0.3, 0.7, 0.97]))
def test_every_row_comes_home(seed, steps, eagerness):
    with LazyDevice(seed, eagerness) as device:
        model = Model(device)
        run(model, Random(seed), steps)
        assert not model.wrong


class _Never:
    """An event that nobody waits for."""

    latest = None

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


# What each wait is for: without it some order leaves a wrong row.
WITHOUT = {
    "the host's wait before it writes an index again": lambda staging: setattr(staging, "_read", [_Never(), _Never()]),
    "the model's wait for the copy": lambda staging: setattr(staging, "_copied", [_Never(), _Never()]),
    "the copy's wait for the model": lambda staging: setattr(staging._copies, "wait_stream", lambda stream: None),
    "the reader's wait for the copy": lambda staging: setattr(staging, "mark", _Never),
}


@pytest.mark.parametrize("wait", WITHOUT)
def test_no_wait_can_be_left_out(wait):
    """Or the test above would prove nothing."""
    for seed in range(200):
        with LazyDevice(seed, 0.5) as device:
            model = Model(device)
            WITHOUT[wait](model.staging)
            run(model, Random(seed), 20)
        if model.wrong:
            return
    pytest.fail("no order was found in which a row is wrong")


@pytest.mark.parametrize("seed", range(20))
def test_a_tap_that_does_not_fire_leaves_nan(seed):
    with LazyDevice(seed, 0.5) as device:
        model = Model(device)
        for k in range(8):
            model.dead = 1 if k >= 3 else None
            slots = model.step([0, 4], k)
            model.staging.wait(model.staging.mark())
            firsts = model.ring.arena[slots][:, list(OFFSETS)].isnan()
            assert firsts.tolist() == [[False, k >= 3, False]] * 2
            model.ring.give_back(slots)


@settings(max_examples=60)
@given(
    scenario=test_recorder.scenario,
    seed=st.integers(0, 2**32 - 1),
    eagerness=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_the_recorder_reads_only_what_has_come_home(tmp_path_factory, scenario, seed, eagerness):
    """All that test_recorder asks of it, with rows that arrive late."""

    def make_staging(rows, ring_rows, table, dtype, _):
        out = torch.full((2 * rows, len(table)), torch.nan, dtype=dtype)
        buffers = TapBuffers(rows, out, torch.tensor([offset for _, _, offset, _ in table.taps()]))
        device.own(*(value for value in vars(buffers).values() if isinstance(value, torch.Tensor)))
        return buffers, DeviceStaging(buffers, Ring(ring_rows, len(table), dtype, pinned=False))

    rows_of = test_recorder.Recorder.rows

    def rows_at_home(recorder, key, tokens):
        recorder.staging.wait(recorder.staging.mark())  # as the thread that stores them does
        return rows_of(recorder, key, tokens)

    with (
        LazyDevice(seed, eagerness) as device,
        patch.object(test_recorder, "make_staging", make_staging),
        patch.object(test_recorder.Recorder, "rows", rows_at_home),
    ):
        test_recorder.test_every_kept_row_is_its_own_tokens.hypothesis.inner_test(tmp_path_factory, scenario)
