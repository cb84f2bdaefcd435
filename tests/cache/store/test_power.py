"""A power cut at any moment: what was acknowledged is there, bit for bit, nothing else is ever read, and a run resumes."""

import importlib.util
import os
import random
import shutil
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.samples import Failure
from hiddenlake.cache.store import files, publisher
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.opened import close_all
from hiddenlake.cache.store.verify import verify

SAMPLES = 5
CAPTURE = "lake/numbers"  # neither folder is there at the start

SETTINGS = [("cells", "none"), ("tokens", "none"), ("both", "none"), ("both", "zstd"), ("both", "fp8")]


def load_power():
    spec = importlib.util.spec_from_file_location("power", Path(__file__).with_name("power.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["power"] = module
    spec.loader.exec_module(module)
    return module


power = load_power()


class Inline(Executor):
    """Does at once what threads would do later, so that every run writes the same in the same order."""

    def submit(self, work, /, *arguments, **settings):
        future = Future()
        try:
            future.set_result(work(*arguments, **settings))
        except BaseException as error:
            future.set_exception(error)
        return future


def settings_of(tiny, kind, codec="none"):
    """Shards of two samples, and several token shards that samples cross."""
    coverage = tiny.coverage(**tiny.KINDS[kind] | {"sites": ("mlp_out",)})
    return {"shard_samples": 2, "coverage": coverage, "codec": codec} | (
        {"shard_tokens": (2, 4)} if coverage.tokens else {}
    )


def die(writer):
    """The process of a writer ends: its lock goes, its files stay."""
    writer._publisher._error = RuntimeError("dead")
    writer._publisher.close()
    writer._claims._member._lock.release()


def write_some(tiny, writer, numbers):
    chosen = writer.reserve([tiny.key(i) for i in numbers], len(numbers))
    for i in numbers:
        if tiny.key(i) in chosen:
            tiny.add(writer, i)


@pytest.fixture
def record(tiny, tmp_path, monkeypatch):
    """Make a capture on a recorded disk: by a writer that dies, and by one that takes over. Returns the events."""

    def run(kind, codec="none"):
        root = tmp_path / "recorded"
        root.mkdir()
        disk = power.Recorder(root)
        settings = settings_of(tiny, kind, codec)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            patch.setattr(publisher, "ThreadPoolExecutor", lambda *_: Inline())
            first = tiny.open_tiny(root / CAPTURE, 2, **settings)
            write_some(tiny, first, [0, 1])
            first.flush()
            disk.acknowledge({tiny.key(0), tiny.key(1)})
            first.fail(Failure(tiny.key(9), 4, "out of memory", 1))
            write_some(tiny, first, [2])
            die(first)
            second = tiny.open_tiny(root / CAPTURE, SAMPLES, **settings)
            disk.acknowledge(second.committed)
            write_some(tiny, second, [3, 2])
            second.flush()
            disk.acknowledge({tiny.key(2), tiny.key(3)})
            write_some(tiny, second, [4])
            second.close()
            disk.acknowledge({tiny.key(4)})
        shutil.rmtree(root)
        return disk.events

    return run


@pytest.fixture
def check(tiny, tmp_path, assert_holds):
    """What every state must be: what is acknowledged is there, nothing wrong is, and the run can be finished."""
    count = 0

    def check(state, acknowledged, settings):
        nonlocal count
        count += 1
        disk = tmp_path / f"cut {count}"  # a path of its own, so that nothing is remembered for it
        path = disk / CAPTURE
        power.lay_out(state, disk)
        held = set(assert_holds(path).keys) if (path / "zarr.json").exists() else set()
        assert acknowledged <= held, f"lost {sorted(acknowledged - held)}"
        tiny.write(path, SAMPLES, **settings)
        assert_holds(path, complete=SAMPLES)
        report = verify(path)
        assert report.ok, report.problems
        left = [name for _, _, names in os.walk(path) for name in names if name.endswith((".partial", ".jsonl"))]
        assert not left
        close_all(open_backend(path))
        shutil.rmtree(disk)

    return check


def different_states(events, mixtures, every=1):
    """(number of events, state, what was acknowledged) of each state that a cut after some events can leave, once.

    every : how many of the states without a capture, which are many and much the same, make one.
    """
    chance, platter, seen, without = random.Random(0), power.Platter(), set(), 0
    for n, event in enumerate([None, *events]):
        if event is not None:
            platter.apply(event)
        for state in platter.states(chance, mixtures):
            found = hash((platter.acknowledged, tuple(state.items())))
            if found in seen:
                continue
            seen.add(found)
            if f"{CAPTURE}/zarr.json" not in state and not platter.acknowledged:
                without += 1
                if without % every:
                    continue
            yield n, state, platter.acknowledged


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "codec"), SETTINGS)
def test_a_power_cut_loses_nothing_that_was_acknowledged(tiny, record, check, kind, codec):
    events, settings = record(kind, codec), settings_of(tiny, kind, codec)
    states = 0
    for n, state, acknowledged in different_states(events, mixtures=2, every=10):
        states += 1
        try:
            check(state, acknowledged, settings)
        except (AssertionError, HiddenlakeError) as error:
            raise AssertionError(f"a cut after {n} events, the last of them {events[n - 1]}: {error}") from error
    assert states > 500
