"""fit_grid straight from a capture on disk gives what it gives from the same arrays in memory."""

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.identity import digest
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_capture, open_writer
from hiddenlake.probing.grid import fit_grid

IDENTITY = {"model": "synthetic/model", "task": "synthetic", "decoding": {"max_new_tokens": 6}}


def sample(data: xr.Dataset, i: int) -> Sample:
    at = data.isel(sample=i)
    prompt, total = int(at.prompt_length), int(at.total_length)
    return Sample(
        str(at.sample.item()), int(at["index"]), 0, str(at.group.item()), "prompt", "answer", tuple(at.answers.item()),
        bool(at.correct), "answer" if at.exact_answer_valid else None, bool(at.exact_answer_valid), tuple(range(total)),
        (-0.5,) * (total - prompt), prompt, total, "stop", tuple(at.token_index.values.tolist()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def memory(make_capture):
    return make_capture(n=200, hidden=16)


@pytest.fixture(scope="module")
def disk(memory, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "capture"
    positions = tuple(memory.position.values.tolist())
    coverage = Coverage(("mlp_out",), tuple(memory.layer.values.tolist()), positions, {"mlp_out": 16}, "float32")
    keys = memory.sample.values.tolist()
    arrival = np.random.default_rng(0).permutation(200)
    with open_writer(
        path, identity=IDENTITY, coverage=coverage, provenance={}, planned=200, shard_samples=64
    ) as writer:
        writer.reserve(keys, 200)
        for i in arrival.tolist():
            shard, slot = writer.slot()
            there = memory.token_index.values[:, i] >= 0
            for site, view in shard.views.items():
                rows = memory[site].isel(sample=i).values
                view[..., there, slot, :] = rows[..., there, :].view(view.dtype)
            writer.add(shard, slot, sample(memory, i))
    return path


def test_a_grid_from_the_store_is_the_grid_from_memory(memory, disk):
    grid, stored = fit_grid(memory, "mlp_out"), fit_grid(disk, "blocks.*.mlp.hook_out")
    xr.testing.assert_equal(grid, stored)
    assert stored.attrs["capture"] == str(disk) and stored.attrs["model"] == "synthetic/model"
    assert stored.attrs["identity"] == digest(IDENTITY)


def test_every_way_of_naming_a_capture_is_the_same(disk):
    capture = open_capture(disk)
    parts = {"layers": [1], "positions": ["-1", "exact_answer_after_last"], "compat": "llmsknow"}
    grids = [fit_grid(given, "mlp_out", **parts) for given in (str(disk), disk, capture, capture.dataset())]
    assert all(grid.identical(grids[0]) for grid in grids[1:])
