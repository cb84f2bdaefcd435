"""Sweeps: what each cell is given, what lies in memory meanwhile, and how they end early."""

import threading

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from xarray.backends import BackendArray
from xarray.core import indexing

from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.testing import small
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.plan import AHEAD, n_threads
from hiddenlake.probing.sweep import sweep

DIMS = ("layer", "position", "sample", "hidden")


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), seed=st.integers(0, 999), masked=st.booleans(), ordered=st.booleans())
def test_each_cell_is_given_its_rows(n, seed, masked, ordered):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 3, n, 5)).astype(np.float32)
    mask = rng.random((3, n)) < 0.7
    values[:, ~mask] = np.nan
    kept, order = rng.random(n) < 0.8, rng.permutation(n)
    borrowed = ~mask[1] & mask[2]
    given_mask = mask.copy()
    given_mask[1] |= borrowed
    found = sweep(
        Cells(xr.DataArray(values, dims=DIMS)), given_mask if masked else None, kept, lambda X, rows, _: (X.copy(), rows),
        order=order if ordered else None, borrow={1: (2, borrowed)} if masked else None,
    )  # fmt: skip
    filled = values.copy()
    if masked:
        filled[:, 1, borrowed] = values[:, 2, borrowed]
    for (layer, position), (X, rows) in found.items():
        inside = kept & (given_mask if masked else mask)[position]
        expected = [i for i in (order if ordered else range(n)) if inside[i]]
        assert rows.tolist() == expected
        assert np.array_equal(X, filled[layer, position, expected])
    assert len(found) == 6


class Slow(BackendArray):
    """A lazy array of zeros that counts its reads, and fails at one of them."""

    def __init__(self, shape, fails_at=None):
        self.shape, self.dtype, self.reads, self.fails_at = shape, np.dtype(np.float32), 0, fails_at

    def __getitem__(self, key):
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key):
        self.reads += 1
        if self.reads == self.fails_at:
            raise OSError("the disk is gone")
        return np.zeros(self.shape, np.float32)[key]


def lazy(backend):
    return Cells(xr.DataArray(xr.Variable(DIMS, indexing.LazilyIndexedArray(backend))))


def test_cells_are_read_ahead_and_never_too_many():
    backend = Slow((8, 3, 4, 2))
    most = n_threads() + AHEAD
    lock, state = threading.Lock(), {"fitted": 0, "ahead": 0}
    full = threading.Event()

    def fit(X, rows, _):
        # Whoever works waits until all memory is full: only a reader that works meanwhile can fill it.
        for _ in range(4000):
            if full.wait(0.005):
                break
            if backend.reads == most:
                full.set()
        with lock:
            state["ahead"] = max(state["ahead"], backend.reads - state["fitted"])
            state["fitted"] += 1

    sweep(lazy(backend), None, np.ones(4, bool), fit)
    assert state == {"fitted": 24, "ahead": most} and backend.reads == 24


def test_an_error_of_a_read_ends_the_sweep():
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        sweep(lazy(backend := Slow((50, 3, 4, 2), fails_at=5)), None, np.ones(4, bool), lambda X, rows, _: None)
    assert threading.active_count() == before and backend.reads < 30


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_as_they_are_stored_give_the_same_probes(tmp_path, dtype):
    small.write(open_backend(tmp_path / "c"), 60, "cells", dtype)
    data = open_capture(tmp_path / "c").dataset()
    y = np.random.default_rng(0).random(60) < 0.5
    mask = (data.token_index != -1).transpose("position", "sample").values
    stored, widened = (
        fit_probes(array, y, mask=mask, cv=3) for array in (data["resid_post"], data["resid_post"].load())
    )
    xr.testing.assert_identical(stored, widened)
    assert Cells(open_capture(tmp_path / "c").dataset()["resid_post"]).dtype.name == dtype
