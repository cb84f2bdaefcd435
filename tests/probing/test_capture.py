"""fit_grid straight from a capture on disk gives what it gives from the same arrays in memory."""

import pytest
import xarray as xr

from hiddenlake.cache.identity import digest
from hiddenlake.cache.store import open_capture
from hiddenlake.probing.grid import fit_grid

IDENTITY = {"model": "synthetic/model", "task": "synthetic", "decoding": {"max_new_tokens": 6}}


@pytest.fixture(scope="module")
def memory(make_capture):
    return make_capture(n=200, hidden=16)


@pytest.fixture(scope="module")
def disk(memory, tmp_path_factory, store_capture):
    return store_capture(memory, tmp_path_factory.mktemp("lake") / "capture", IDENTITY)


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
