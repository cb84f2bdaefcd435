"""The store benchmark: it asks all for the same, judges the goals that were set, and says which rival could not run."""

import dataclasses
from contextlib import ExitStack

import numpy as np
import pytest
import store
from _disk import disk
from _store_bench import Reads, StoreBench
from _stores import CELL, FULL, KINDS, OURS, QUICK, RIVALS, SHUFFLED, SIZES, Size, Store

TINY = Size(layers=3, hidden=32, samples=64, quick_samples=64, positions=4)


@pytest.fixture
def bench(tmp_path):
    with ExitStack() as stack:
        yield StoreBench(tmp_path, TINY, TINY.samples, dataclasses.replace(QUICK, other_reads=1, reads=1), stack)


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
def test_sizes_are_what_was_promised(size):
    row = size.layers * size.positions * size.hidden * 2
    assert size.samples * row >= 4e9 and size.quick_samples * row >= 0.5e9
    for samples in (size.samples, size.quick_samples):
        for rival in RIVALS.values():
            assert samples // 16 <= rival.samples(samples) <= samples and rival.samples(samples) % 64 == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_wants_lie_inside(kind):
    random = np.random.default_rng(0)
    for cold in (False, True):
        for want in [want for _ in range(50) for want in kind.wants(TINY, 40, random, cold)]:
            for axis, length in (("layers", 3), ("positions", 4)):
                assert want[axis] is None or 0 <= want[axis][0] < want[axis][1] <= length
            samples = want["samples"]
            assert samples is None or (samples == sorted(set(samples)) and 0 <= samples[0] and samples[-1] < 40)
            assert samples is None or kind.one_sample == (len(samples) == 1)
            assert 0 <= want["at"] < 1


def test_goals_are_those_of_the_cell():
    goal = store.limit_goal
    assert goal(CELL, False, store.CHECKED, store.LIMIT) == goal(CELL, False, store.INTO_BUFFER, store.LIMIT) == 0.6
    assert goal(CELL, False, store.UNCHECKED, store.LIMIT) == 1.0
    assert goal(CELL, True, store.CHECKED, store.LIMIT) == goal(CELL, True, store.CHECKED, store.ANNOUNCED) == 0.8
    assert (
        goal(CELL, False, store.CHECKED, store.NEW_MEMORY) is goal(KINDS[1], False, store.CHECKED, store.LIMIT) is None
    )
    assert goal(CELL, False, (SHUFFLED, "checked"), store.LIMIT) is None


def test_all_rows_of_a_size(bench):
    rows = store.measure(bench, [RIVALS["memmap"]])
    names = {(row.case, row.rival_name) for row in rows}
    assert len(names) == len(rows)
    assert {
        ("32: write", "plain files"),
        ("32: write", "np.memmap"),
        ("32: peak memory of a write", "two shard buffers and 64 MiB"),
        ("32: warm X[layer, position], checked", "one contiguous read, into a buffer"),
        ("32: cold X[layer, position], checked, arrived in another order", "one contiguous read, announced"),
        ("32: cold one sample, one position, all layers, checked", "np.memmap"),
    } <= names
    assert all(row.ours > 0 and row.rival > 0 and row.met is None for row in rows)
    assert not [path for path in bench.folder.iterdir() if path.is_dir()]


def test_a_rival_that_cannot_run_is_a_row(bench, monkeypatch):
    broken = Store("broken", "store_nowhere.py", "")
    monkeypatch.setitem(RIVALS, "broken", broken)
    bench.write(OURS)
    assert store.read_rival(bench, broken) == store.read_rival(bench, broken) == []
    assert store.write_rivals(bench, [broken]) == []
    row = store.failed_row(bench, broken)
    assert row.rival_name == "broken" and "broken ended" in row.note and row.ratio is None


def test_what_is_no_rival_must_run(bench):
    with pytest.raises(RuntimeError, match="no rival ended"):
        bench.measure_writes((Store("no rival", "store_nowhere.py", ""), OURS), 1, warm_up=False)


def test_a_row_that_was_not_cold_is_not_judged(bench):
    bench.rounds = FULL
    warm = Reads([1e9] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3)
    cold = Reads([1e9] * 3, [1.0] * 3, [1.0] * 3, [1.04] * 3)
    for ours, met, said in ((cold, True, False), (warm, None, True)):
        row = store.read_row(
            bench, {store.CHECKED: ours, store.LIMIT: cold}, CELL, True, store.CHECKED, store.LIMIT, 0.8
        )
        assert row.met is met and ("was not cold" in row.note) is said


def test_the_disk_is_named(tmp_path):
    facts = disk(tmp_path)
    assert facts["file_system"] and facts["kernel"]
