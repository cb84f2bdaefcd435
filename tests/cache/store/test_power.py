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

# What a capture holds, its codec, the share of states that are read, and of those from which the run is finished: it
# takes ten times as long, and most of them differ in little. What holds both has all the steps of the others.
SETTINGS = [
    ("cells", "none", 0.25, 0.05),
    ("tokens", "none", 0.25, 0.03),
    ("both", "none", 1, 0.04),
    ("both", "zstd", 0.1, 0.01),
    ("both", "fp8", 0.05, 0.005),
]


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
        writers = []
        disk = power.Recorder(root, lambda: sum(writer.published for writer in writers))
        settings = settings_of(tiny, kind, codec)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            patch.setattr(files, "_PAST_CACHE", files._BLOCK)  # a few pages are as long as these files get
            patch.setattr(publisher, "ThreadPoolExecutor", lambda *_: Inline())
            first = tiny.open_tiny(root / CAPTURE, 2, **settings)
            writers.append(first)
            write_some(tiny, first, [0, 1])
            first.flush()
            disk.acknowledge({tiny.key(0), tiny.key(1)})
            first.fail(Failure(tiny.key(9), 4, "out of memory", 1))
            write_some(tiny, first, [2])
            die(first)
            second = tiny.open_tiny(root / CAPTURE, SAMPLES, **settings)
            writers.append(second)
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
    """What a state must be: what is acknowledged is there, nothing wrong is, and, if asked, the run can be finished."""
    count = 0

    def check(state, acknowledged, settings, finish=True):
        nonlocal count
        count += 1
        disk = tmp_path / f"cut {count}"  # a path of its own, so that nothing is remembered for it
        path = disk / CAPTURE
        power.lay_out(state, disk)
        held = set(assert_holds(path).keys) if (path / "zarr.json").exists() else set()
        assert acknowledged.keys <= held, f"lost {sorted(acknowledged.keys - held)}"
        assert acknowledged.count <= len(held), f"{acknowledged.count} were published, but {len(held)} are there"
        if finish:
            tiny.write(path, SAMPLES, **settings)
            assert held <= set(assert_holds(path, complete=SAMPLES).keys)
            report = verify(path)
            assert report.ok, report.problems
            left = [name for _, _, names in os.walk(path) for name in names if name.endswith((".partial", ".jsonl"))]
            assert not left, left
        close_all(open_backend(path))
        shutil.rmtree(disk)

    return check


def different_states(events, mixtures=2):
    """(number of events, state, what was acknowledged) of each state that a cut after some events can leave, once."""
    chance, platter, seen = random.Random(0), power.Platter(), set()
    for n, event in enumerate([None, *events]):
        if event is not None:
            platter.apply(event)
        for state in platter.states(chance, mixtures):
            found = hash((platter.acknowledged, tuple(state.items())))
            if found not in seen:
                seen.add(found)
                yield n, state, platter.acknowledged


def readable(state):
    """The part of a state that a reader of the capture looks at."""
    names = ("commits/", "samples/", "mlp_out/", "attn_z/", "final_norm/", "embed/", "row_crc/", "scale/", "tokens/")
    within = {name.removeprefix(f"{CAPTURE}/"): data for name, data in state.items() if name.startswith(CAPTURE)}
    return {
        name: data
        for name, data in within.items()
        if name == "zarr.json" or (name.startswith(names) and "/." not in name)
    }


def check_all(events, settings, check, share, finished):
    """Read a share of the states that differ for a reader; finish a share of those that differ at all.

    Returns how many were.
    """
    chance, seen, counts = random.Random(1), set(), [0, 0]
    for n, state, acknowledged in different_states(events):
        found = hash((acknowledged, tuple(readable(state).items())))
        # Where there is no capture yet, there is nothing to read, and what lies there is much the same each time.
        finish = chance.random() < (finished if "zarr.json" in readable(state) else finished / 5)
        if finish or (found not in seen and chance.random() < share):
            seen.add(found)
            counts = [counts[0] + 1, counts[1] + finish]
            try:
                check(state, acknowledged, settings, finish)
            except (AssertionError, HiddenlakeError) as error:
                raise AssertionError(f"a cut after {n} events, the last of them {events[n - 1]}: {error}") from error
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "codec", "share", "finished"), SETTINGS)
def test_a_power_cut_loses_nothing_that_was_acknowledged(tiny, record, check, kind, codec, share, finished):
    counts = check_all(record(kind, codec), settings_of(tiny, kind, codec), check, share, finished)
    assert min(counts) > 20, counts


@pytest.mark.parametrize("forgotten", ["files", "folders"])
def test_a_store_that_did_not_fsync_would_be_found_out(tiny, record, check, forgotten):
    """What the checks above are worth: without the fsyncs of files, or of folders, they find what is lost."""
    events = record("both")
    folders = {power.ROOT, *(event.node for event in events if isinstance(event, power.Folder))}
    kept = [
        event
        for event in events
        if not isinstance(event, power.Sync) or (event.node in folders) != (forgotten == "folders")
    ]
    assert len(kept) < len(events)
    with pytest.raises(AssertionError, match="a cut after"):
        check_all(kept, settings_of(tiny, "both"), check, share=1, finished=0)


@pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
def test_what_a_killed_writer_left_is_durable_once_the_next_one_counts_it(tiny, tmp_path, monkeypatch, kind):
    """A killed writer may have linked its commit and not fsynced the folder. Others see it, and leave its samples out."""
    settings = settings_of(tiny, kind)
    first = tmp_path / "first"
    first.mkdir()

    class Killed(BaseException):
        """Ends a writer where it is."""

    class Mortal(power.Recorder):
        def link(self, source, target):
            super().link(source, target)
            if Path(target).parent.name == "commits":
                raise Killed

    disk = Mortal(first)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", disk)
        patch.setattr(publisher, "ThreadPoolExecutor", lambda *_: Inline())
        writer = tiny.open_tiny(first / CAPTURE, 2, **settings)
        write_some(tiny, writer, [0, 1])
        with pytest.raises(HiddenlakeError):
            writer.flush()
        die(writer)
        second = tiny.open_tiny(first / CAPTURE, 2, **settings)
        assert second.reserve([tiny.key(0), tiny.key(1)], 2) == []
        second.close()
    platter = power.Platter()
    for event in disk.events:
        platter.apply(event)
    assert all(f"{CAPTURE}/commits/0.json" in state for state in platter.states(random.Random(0), 20))
