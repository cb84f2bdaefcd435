"""What is true of a lake at any moment, whatever was done to it."""

import os

import numpy as np

from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.commits import list_commits, read_commit, valid
from hiddenlake.cache.store.verify import verify


def committed_samples_are_exact(tiny, place, capture):
    """Every sample that a capture shows has the bits that were written, in every way of reading."""
    c = capture.coverage
    numbers = [int(key.removeprefix("key-")) for key in capture.keys]
    assert numbers == sorted(set(numbers)), "samples in task order, each once"
    full = tiny.full_coverage(c)
    for site in c.widths if numbers else ():
        layers = [full.layers.index(layer) for layer in c.layers]
        if c.positions:
            columns = [full.positions.index(position) for position in c.positions]
            truth = np.stack([tiny.rows(i, full)[site] for i in numbers], axis=-2)
            truth = truth[..., columns, :, :] if truth.ndim == 3 else truth[layers][:, columns]
            same_bits(capture.read(site), truth)
            row = len(numbers) // 2
            same_bits(capture.read(site, samples=row), truth[..., row, :])
        if c.tokens:
            truth = [tiny.tokens(i, full)[site] for i in numbers]
            truth = [one if one.ndim == 2 else one[layers] for one in truth]
            found = capture.read_tokens(site)
            assert found.lengths.tolist() == [one.shape[-2] for one in truth]
            same_bits(found.values, np.concatenate(truth, axis=-2))


def same_bits(found, truth):
    assert found.shape == truth.shape
    assert np.array_equal(np.ascontiguousarray(found).view(np.uint8), np.ascontiguousarray(truth).view(np.uint8))


def labels_are_what_was_added(capture, labels):
    """labels : name -> key -> value."""
    tables = capture.labels()
    assert set(tables) == {name for name, values in labels.items() if values is not None}
    for name, table in tables.items():
        assert dict(zip(table["key"].to_pylist(), table["v"].to_pylist(), strict=True)) == labels[name]
        assert set(table["key"].to_pylist()) <= set(capture.keys)


def commits_agree(place):
    """No sample is in two commits that count, and a commit names no file of another shard but token shards."""
    commits = valid({shard: read_commit(place, shard) for shard in list_commits(place)})
    keys = [key for commit in commits.values() for key in commit.keys if key is not None]
    assert len(keys) == len(set(keys))
    layout = open_capture(place).snapshot.layout
    for shard, commit in commits.items():
        for name in commit.files:
            assert layout.shard_of(name) == shard or layout.token_shard_of(name) in commit.token_shards


def nothing_is_left_over(place, writers):
    """Once nobody writes and garbage was collected, there is no file that nobody vouches for.

    writers : how many are at work.
    """
    if writers:
        return
    left = [name for _, _, names in os.walk(str(place)) for name in names if name.endswith((".partial", ".jsonl"))]
    assert not left, left


def verifies(place):
    report = verify(place)
    assert report.ok, report.problems
