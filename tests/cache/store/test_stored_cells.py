"""Stored cells: the same rows as xarray reads, in the capture's own dtype, whatever was selected."""

import numpy as np
import pytest

from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.cells import StoredCells

SAMPLES = 19


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def capture(request, tiny, tmp_path):
    tiny.write(tmp_path / "c", SAMPLES, dtype=request.param)
    return open_capture(tmp_path / "c")


def selections(data):
    return [
        data["mlp_out"],
        data["mlp_out"].isel(layer=[2, 0], position=slice(None, None, -1), sample=[5, 3, 3, 18]),
        data["mlp_out"].isel(layer=1),
        data["mlp_out"].isel(position=-1, sample=slice(4, None, 3)),
        data["mlp_out"].isel(layer=0, position=1),
        data["mlp_out"].isel(layer=slice(1, None)).rename(layer="position", position="layer"),
        data["embed"].isel(sample=slice(None, None, -2)),
    ]


def test_rows_are_those_that_xarray_reads(capture):
    data = capture.dataset()
    for array in selections(data):
        found = StoredCells.of(array)
        shape = [array.sizes.get(dim, 1) for dim in ("layer", "position")]
        samples = np.random.default_rng(0).permutation(array.sizes["sample"])[:7]
        for layer, position in np.ndindex(*shape):
            at = {dim: i for dim, i in (("layer", layer), ("position", position)) if dim in array.dims}
            out = found.read(layer, position, samples, np.empty)
            assert out.dtype.name == capture.coverage.dtype and out.shape == (len(samples), found.width)
            expected = array.isel(at).values[samples]
            assert np.array_equal(out.astype(np.float32), expected, equal_nan=True)


def test_what_is_not_whole_rows_of_a_capture_is_left_to_xarray(capture):
    data = capture.dataset()
    array = data["mlp_out"]
    assert StoredCells.of(array) is not None
    for other in (
        array.isel(hidden=slice(0, 8)), array.isel(hidden=slice(None, None, -1)), array.load(), array + 1,
        data["token_index"], array.transpose("sample", "layer", "position", "hidden"),
    ):  # fmt: skip
        assert StoredCells.of(other) is None


def test_a_fingerprint_is_that_of_the_bytes(capture, tiny, tmp_path):
    data = capture.dataset()
    prints = [StoredCells.of(array).fingerprint() for array in [*selections(data), data["resid_post"]]]
    assert len(set(prints)) == len(prints)
    again = open_capture(tmp_path / "c").dataset()["mlp_out"]
    assert StoredCells.of(again).fingerprint() == prints[0]
    tiny.write(tmp_path / "c", SAMPLES + 3, dtype=capture.coverage.dtype)
    assert StoredCells.of(again).fingerprint() == prints[0], "later commits do not show up in it"
    assert StoredCells.of(open_capture(tmp_path / "c").dataset()["mlp_out"]).fingerprint() != prints[0]
