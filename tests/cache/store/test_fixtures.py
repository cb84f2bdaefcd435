"""Captures that released format versions wrote: every later version reads them, bit for bit, with every reader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from hiddenlake.cache.store import fp8, open_capture
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.verify import verify

FIXTURES = Path(__file__).with_name("fixtures")
EVERY = sorted(path for version in FIXTURES.iterdir() for path in version.iterdir())
SAMPLES = 7


@pytest.fixture(params=EVERY, ids=lambda path: f"{path.parent.name}-{path.name}")
def path(request, tmp_path):
    # A copy: a check keeps its report in the capture.
    return shutil.copytree(request.param, tmp_path / "c")


def as_float32(bits, capture):
    values = bits.view(DTYPES[capture.coverage.dtype][1])
    if capture.codec == "fp8":
        return fp8.decode(*fp8.encode(np.ascontiguousarray(values)))
    return values.astype(np.float32)


def test_there_are_fixtures():
    assert len(EVERY) >= 3


def test_it_holds_what_was_written(path, expected, tiny):
    capture = open_capture(path)
    assert capture.keys == [tiny.key(i) for i in range(SAMPLES)]
    for site, bits in expected(SAMPLES, capture.coverage).items():
        assert np.array_equal(capture.read(site, dtype="float32"), as_float32(bits, capture), equal_nan=True)
    for i in range(SAMPLES):
        for site, bits in tiny.tokens(i, capture.coverage).items():
            found = capture.read_tokens(site, samples=i, dtype="float32").values
            assert np.array_equal(found, as_float32(bits, capture), equal_nan=True)
    assert capture.labels()["score"]["v"].to_pylist() == [0.0, 0.5, 1.0]
    assert capture.failures()["cause"].to_pylist() == ["the cause"]
    samples = capture.samples()
    assert samples["prompt"].to_pylist() == [tiny.sample(i).prompt for i in range(SAMPLES)]
    report = verify(path)
    assert report.ok, report.problems


def test_other_readers_read_the_same(path):
    capture = open_capture(path)
    group = zarr.open_group(path, mode="r")
    committed = np.flatnonzero(group["committed"][:])
    order = committed[[list(group["sample"][:][committed]).index(key) for key in capture.keys]]
    tree = xarray.open_datatree(path, engine="zarr")
    for site in capture.coverage.widths:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{site}"}}
        raw = np.asarray(tensorstore.open(spec, read=True).result().read().result())
        assert np.array_equal(raw.view(np.uint8), group[site][:].view(np.uint8))
        assert np.array_equal(raw.view(np.uint8), tree[site].values.view(np.uint8))
        values = fp8.decode(raw, group["scale"][site][:]) if capture.codec == "fp8" else raw.astype(np.float32)
        assert np.array_equal(values[..., order, :], capture.read(site, dtype="float32"), equal_nan=True)


def test_writing_goes_on_in_it(path, tiny, expected):
    capture = open_capture(path)
    tiny.write(path, SAMPLES + 2, coverage=capture.coverage)
    after = open_capture(path)
    assert len(after) == SAMPLES + 2
    for site, bits in expected(SAMPLES + 2, capture.coverage).items():
        assert np.array_equal(after.read(site, dtype="float32"), as_float32(bits, capture), equal_nan=True)
    assert verify(path).ok
