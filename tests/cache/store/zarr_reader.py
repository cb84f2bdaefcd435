"""Reads a fixture capture by zarr and xarray, and compares with hiddenlake; run under other Pythons and other zarrs.

python zarr_reader.py CAPTURE...
"""

import sys

import numpy as np
import xarray
import zarr

from hiddenlake.cache.store import fp8, open_capture


def compare(path):
    capture = open_capture(path)
    group = zarr.open_group(path, mode="r")
    tree = xarray.open_datatree(path, engine="zarr")
    committed = np.flatnonzero(group["committed"][:])
    names = list(group["sample"][:][committed])
    order = committed[[names.index(key) for key in capture.keys]]
    for site in capture.coverage.widths:
        raw = group[site][:]
        assert np.array_equal(raw.view(np.uint8), tree[site].values.view(np.uint8)), site
        values = fp8.decode(raw, group["scale"][site][:]) if capture.codec == "fp8" else raw.astype(np.float32)
        assert np.array_equal(values[..., order, :], capture.read(site, dtype="float32"), equal_nan=True), site
        tokens = group["tokens"][site][:]
        if capture.codec == "fp8":
            tokens = fp8.decode(tokens, group["scale/tokens"][site][:])
        starts, lengths = (group["tokens"][name][:][order] for name in ("sample_start", "sample_length"))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            mine = capture.read_tokens(site, samples=row, dtype="float32").values
            assert np.array_equal(tokens[..., start : start + length, :].astype(np.float32), mine), (site, row)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        compare(folder)
    print(zarr.__version__, len(sys.argv) - 1)
