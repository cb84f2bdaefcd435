"""Readers that know Zarr and nothing of hiddenlake open a served capture of any kind, and read what its folder holds."""

import asyncio

import numpy as np
import pytest
import xarray as xr
import zarr

import hiddenlake
from hiddenlake.cache.store import fp8

from .conftest import CAPTURES, add_key

SEEN = [name for name in CAPTURES if name != "theirs"]


def fsspec_store(url, headers):
    return zarr.storage.FsspecStore.from_url(url, storage_options={"headers": headers}, read_only=True)


def obstore_store(url, headers):
    from obstore.store import HTTPStore

    client = {"default_headers": headers, "allow_http": True}
    return zarr.storage.ObjectStore(HTTPStore.from_url(url, client_options=client), read_only=True)


STORES = {"fsspec": fsspec_store, "obstore": obstore_store}


@pytest.fixture(scope="module")
def headers(server):
    return {"Authorization": f"Bearer {add_key(server.lake, 'zarr')}"}


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.dtype.kind in "OTU":  # text
        assert found.tolist() == expected.tolist()
    else:
        assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize(
    ("name", "reader"), [*((name, "obstore") for name in SEEN), ("cells", "fsspec"), ("tokens", "fsspec")]
)
def test_every_array_is_the_one_in_the_folder(server, headers, name, reader):
    """Whole, one cell, some samples: whole shards, chunks of shards, and their indices, by ranges."""
    here = zarr.open_group(server.lake / name, mode="r", use_consolidated=True)
    found = zarr.open_group(STORES[reader](f"{server.url}/v1/zarr/{name}", headers), mode="r", use_consolidated=True)
    expected = {path: array for path, array in here.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert len(expected) > 8
    assert {path for path, array in found.members(max_depth=None) if isinstance(array, zarr.Array)} == expected.keys()
    for path, array in expected.items():
        same(found[path][:], array[:])
        if array.ndim == 4:
            same(found[path][1, -1], array[1, -1])
            same(found[path][0, 0, 3:7], array[0, 0, 3:7])


@pytest.mark.parametrize("name", SEEN)
def test_its_numbers_are_those_that_the_capture_gives(server, headers, name):
    """By the coordinates that are served beside them, as somebody would who has Zarr alone."""
    capture = hiddenlake.open_capture(server.lake / name)
    group = zarr.open_group(fsspec_store(f"{server.url}/v1/zarr/{name}", headers), mode="r", use_consolidated=True)
    keys = group["sample"][:].tolist()
    at = np.array([keys.index(key) for key in capture.keys])
    assert group["committed"][:][at].all() and group["committed"][:].sum() == len(at)
    for site in capture.coverage.widths:
        if capture.coverage.positions:
            values = group[site][:]
            values = (
                fp8.decode(values, group["scale"][site][:]) if capture.codec == "fp8" else values.astype(np.float32)
            )
            np.testing.assert_array_equal(values[..., at, :], capture.read(site, dtype="float32"))
        if capture.coverage.tokens:
            values = group["tokens"][site][:]
            values = (
                fp8.decode(values, group["scale/tokens"][site][:])
                if capture.codec == "fp8"
                else values.astype(np.float32)
            )
            starts, lengths = (group["tokens"][name][:][at] for name in ("sample_start", "sample_length"))
            rows = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
            np.testing.assert_array_equal(values[..., rows, :], capture.read_tokens(site, dtype="float32").values)


@pytest.mark.parametrize(
    ("name", "how"), [("cells", "url"), ("both", "url"), ("cells", "fsspec"), ("cells", "obstore")]
)
def test_xarray_opens_it(server, headers, name, how):
    url = f"{server.url}/v1/zarr/{name}"
    with xr.open_zarr(server.lake / name, consolidated=True) as here:
        if how == "url":
            found = xr.open_zarr(url, consolidated=True, storage_options={"headers": headers})
        else:
            found = xr.open_zarr(STORES[how](url, headers), consolidated=True)
        with found:
            assert list(found.variables) == list(here.variables) and found.attrs == here.attrs
            for variable in here.variables:
                assert found[variable].dims == here[variable].dims and found[variable].attrs == here[variable].attrs
                same(found[variable].values, here[variable].values)


def test_xarray_opens_all_its_groups(server, headers):
    with xr.open_datatree(server.lake / "tokens", engine="zarr") as here:
        store = fsspec_store(f"{server.url}/v1/zarr/tokens", headers)
        with xr.open_datatree(store, engine="zarr", consolidated=True) as found:
            assert found.groups == here.groups and len(here.groups) > 2
            for group in here.groups:
                for variable in here[group].data_vars:
                    same(found[group][variable].values, here[group][variable].values)


@pytest.mark.parametrize("reader", STORES)
def test_without_a_key_nothing_is_opened(server, reader):
    with pytest.raises(Exception, match=r"(?i)401|unauth|not found|denied"):
        zarr.open_group(STORES[reader](f"{server.url}/v1/zarr/cells", {}), mode="r", use_consolidated=True)


@pytest.mark.parametrize("reader", STORES)
def test_damage_is_found_by_the_reader(lake, serve, reader):
    """The bytes are sent as they lie there; their checksums are in them."""
    capture = hiddenlake.open_capture(lake / "cells")
    file = lake / "cells" / capture.snapshot.layout.data_file("mlp_act", 0)
    raw = bytearray(file.read_bytes())
    raw[3] ^= 4
    file.write_bytes(raw)
    key = add_key(lake, "x")
    one = serve(lake, key=key)
    store = STORES[reader](f"{one.url}/v1/zarr/cells", {"Authorization": f"Bearer {key}"})
    group = zarr.open_group(store, mode="r", use_consolidated=True)
    with pytest.raises(ValueError, match="(?i)checksum"):
        group["mlp_act"][0, 0]
    same(group["resid_post"][:], zarr.open_group(lake / "cells", mode="r")["resid_post"][:])


def test_many_readers_at_once(server, headers):
    expected = zarr.open_group(server.lake / "both", mode="r")["mlp_act"][:]
    wrong = []

    def work(reader):
        store = STORES[reader](f"{server.url}/v1/zarr/both", headers)
        group = zarr.open_group(store, mode="r", use_consolidated=True)
        for _ in range(2):
            if group["mlp_act"][:].tobytes() != expected.tobytes():
                wrong.append(reader)

    async def run():
        await asyncio.gather(*(asyncio.to_thread(work, reader) for reader in list(STORES) * 2))

    asyncio.run(run())
    assert not wrong
