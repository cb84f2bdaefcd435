"""Raw Zarr over HTTP: the committed files, whole or in parts, and nothing else of the folder."""

import hashlib
import shutil

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.service import raw_zarr

from .conftest import CAPTURES, add_key, capture_of, in_process, problem, write_capture

OURS = [name for name in CAPTURES if name != "theirs"]


def files_of(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def is_array(name):
    """What a reader that knows Zarr only may need."""
    own = ("samples/", "claims/", "commits/", "labels/", "failures/", "writers/")
    return not name.startswith(own) and name != "verified.json"


@pytest.mark.parametrize("name", OURS)
def test_every_file_of_an_array_is_served_as_it_lies_there_and_no_other(app, name):
    folder = app.lake / name
    files = files_of(folder)
    assert any(file.startswith("commits/") for file in files) and any(file.startswith("samples/") for file in files)
    for file in files:
        response = app.get(f"/v1/zarr/{name}/{file}")
        if not is_array(file):
            problem(response, 404, "not_found")
            problem_free = app.head(f"/v1/zarr/{name}/{file}")
            assert problem_free.status_code == 404 and not problem_free.content
            continue
        data = (folder / file).read_bytes()
        assert response.status_code == 200 and response.content == data
        headers = app.head(f"/v1/zarr/{name}/{file}").headers
        for field in ("content-length", "etag", "content-type", "accept-ranges", "cache-control"):
            assert headers[field] == response.headers[field]
        assert int(headers["content-length"]) == len(data) and headers["accept-ranges"] == "bytes"


@pytest.fixture(scope="module", params=["resid_post", "resid_post/zarr.json"])
def file(app, request):
    """A committed one, and one that repeats what was committed."""
    [name] = [request.param] if request.param.endswith("json") else [
        str(f.relative_to(app.lake / "cells")) for f in (app.lake / "cells" / request.param).glob("c.*.0.0")
    ]  # fmt: skip
    return f"/v1/zarr/cells/{name}", (app.lake / "cells" / name).read_bytes()


@given(data=st.data())
def test_ranges(app, file, data):
    """RFC 9110, 14: from, from to, the last ones."""
    url, whole = file
    size = len(whole)
    at = st.integers(0, size + 10)
    first, last = data.draw(at), data.draw(at)
    header, expected = data.draw(
        st.sampled_from(
            [
                (f"bytes={first}-", whole[first:]),
                (f"bytes={first}-{first + last}", whole[first : first + last + 1]),
                (f"bytes=-{last}", whole[-last:] if last else b""),
            ]
        )
    )
    response = app.get(url, headers={"Range": header})
    if not expected:
        problem(response, 416, "range")
        assert response.headers["content-range"] == f"bytes */{size}"
        return
    assert response.status_code == 206 and response.content == expected
    start = size - len(expected) if header.startswith("bytes=-") else first
    assert response.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"
    assert int(response.headers["content-length"]) == len(expected)


@pytest.mark.parametrize(
    "header",
    ["bytes=0-1,4-5", "bytes=5-2", "bytes=-", "bytes=", "bytes", "items=0-1", "bytes=a-b", "bytes=0x1-2", "bytes=1 -2",
     "bytes=--1", "bytes=" + "9" * 30 + "-", "bytes=-" + "9" * 5000, "bytes=+1-2", "bytes=0.5-1"],
)  # fmt: skip
def test_a_range_that_is_none_is_ignored(app, file, header):
    url, whole = file
    response = app.get(url, headers={"Range": header})
    assert response.status_code == 200 and response.content == whole and "content-range" not in response.headers


@given(header=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30))
def test_no_range_makes_it_fail(app, file, header):
    url, whole = file
    for value in (header, f"bytes={header}"):
        response = app.get(url, headers={"Range": value.encode("latin-1")})
        assert response.status_code in (200, 206, 416)
        assert response.status_code == 416 or response.content in whole


def test_ranges_are_of_get_alone(app, file):
    url, whole = file
    response = app.head(url, headers={"Range": "bytes=0-1"})
    assert response.status_code == 200 and int(response.headers["content-length"]) == len(whole)


def test_what_has_not_changed_is_not_sent_again(app, file):
    url, whole = file
    etag = app.get(url).headers["etag"]
    assert etag.startswith('"') and etag == app.get(url, headers={"Range": "bytes=0-0"}).headers["etag"]
    for named in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = app.get(url, headers={"If-None-Match": named})
        assert response.status_code == 304 and not response.content and response.headers["etag"] == etag
        assert "content-length" not in response.headers or response.headers["content-length"] == "0"
    for named in ('"other"', etag.strip('"'), ""):
        assert app.get(url, headers={"If-None-Match": named}).content == whole


def test_a_part_is_of_the_file_that_is_meant(app, file):
    """Else two files' bytes would be put together."""
    url, whole = file
    etag = app.get(url).headers["etag"]
    part = app.get(url, headers={"Range": "bytes=1-2", "If-Range": etag})
    assert part.status_code == 206 and part.content == whole[1:3]
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        response = app.get(url, headers={"Range": "bytes=1-2", "If-Range": other})
        assert response.status_code == 200 and response.content == whole


def test_an_etag_is_another_when_the_file_is(lake):
    """Also of files that are written anew as a capture grows."""
    with in_process(lake) as client:
        names = ["zarr.json", "sample/c.3", "committed/c.3"]
        before = {name: client.get(f"/v1/zarr/cells/{name}").headers["etag"] for name in names}
        assert len(set(before.values())) == len(names)
        write_capture(lake / "cells", "cells", "bfloat16", "none", samples=40)
        client.parts.lake.refresh("cells")
        for name in names:
            response = client.get(f"/v1/zarr/cells/{name}")
            digest = hashlib.sha256((lake / "cells" / name).read_bytes()).hexdigest()
            assert response.headers["etag"] == f'"{digest[:32]}"'
        assert client.get("/v1/zarr/cells/zarr.json").headers["etag"] != before["zarr.json"]


def test_files_of_two_captures_have_other_etags(lake):
    """Though they have one name and one size: what was captured anew in the same place is not what a reader knew."""
    with in_process(lake) as client:
        [name] = [str(f.relative_to(lake / "cells")) for f in (lake / "cells" / "embed").glob("c.*0.0")]
        before = client.get(f"/v1/zarr/cells/{name}")
        shutil.rmtree(lake / "cells")
        write_capture(lake / "cells", "cells", "bfloat16", "none", other=1)
        data = bytearray((lake / "cells" / name).read_bytes())
        client.parts.lake.refresh("cells")
        after = client.get(f"/v1/zarr/cells/{name}")
        assert after.content == data and len(after.content) == len(before.content)
        assert (after.headers["etag"] == before.headers["etag"]) == (after.content == before.content)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "a link", "a folder", "a pipe"])
def test_a_file_that_is_not_what_was_committed(lake, change):
    """Said before the answer begins, though nobody looks at its bytes."""
    import os

    [file] = (lake / "cells" / "embed").glob("c.*0.0")
    name, data = file.relative_to(lake / "cells"), file.read_bytes()
    file.unlink()
    if change in ("shorter", "longer"):
        file.write_bytes(data[:-1] if change == "shorter" else data + b"x")
    elif change == "a link":
        (lake / "outside").write_bytes(data)
        file.symlink_to(lake / "outside")
    elif change == "a folder":
        file.mkdir()
    elif change == "a pipe":
        os.mkfifo(file)
    with in_process(lake) as client:
        for ask in (client.get, client.head):
            response = ask(f"/v1/zarr/cells/{name}")
            assert response.status_code in (500, 503)
            if ask is client.get:
                body = problem(response, response.status_code)
                assert str(lake) not in str(body)


def test_a_file_that_becomes_shorter_while_it_is_sent(lake, serve, monkeypatch):
    """The connection breaks: a complete body is never made of half a file."""
    write_capture(lake / "big", "tokens", "float32", "none", samples=2)
    one = serve(lake, key=add_key(lake, "tests"))
    capture = capture_of(lake, "big")
    name = max(capture.commits[0].files, key=lambda name: capture.commits[0].files[name].size)
    size = (lake / "big" / name).stat().st_size
    whole = one.http.get(f"/v1/zarr/big/{name}")
    assert whole.status_code == 200 and len(whole.content) == size
    # in this process, where the moment can be chosen
    monkeypatch.setattr(raw_zarr, "_PART_BYTES", 64)
    with in_process(lake) as client:
        taken = []
        real = raw_zarr._parts

        def parts(file, start, stop, files):
            for number, part in enumerate(real(file, start, stop, files)):
                taken.append(part)
                yield part
                if number == 3:
                    with open(lake / "big" / name, "r+b") as cut:
                        cut.truncate(size // 2)

        monkeypatch.setattr(raw_zarr, "_parts", parts)
        with pytest.raises((httpx.HTTPError, ConnectionAbortedError, OSError)):
            strict = _strict(client)
            strict.get(f"/v1/zarr/big/{name}")
        assert 4 <= len(taken) < size // 64


def _strict(client):
    """A client that tells what the app raises: over a socket, that is a connection that breaks."""
    from starlette.testclient import TestClient

    return TestClient(client.app, "http://127.0.0.1", headers=dict(client.headers))


def test_a_capture_that_another_one_has_replaced(lake):
    """Between the look at the capture and the look at the file."""
    write_capture(lake / "new", "cells", "bfloat16", "none", other=1)
    with in_process(lake) as client:
        assert client.get("/v1/zarr/cells/zarr.json").status_code == 200
        shutil.rmtree(lake / "cells")
        (lake / "new").rename(lake / "cells")
        client.parts.lake._listed = 1e18  # nothing is looked at again
        client.parts.lake._opened["cells"].when = 1e18
        [name] = [str(f.relative_to(lake / "cells")) for f in (lake / "cells" / "embed").glob("c.*0.0")]
        for path in ("zarr.json", name):
            problem(client.get(f"/v1/zarr/cells/{path}"), 503, "store")


@pytest.mark.parametrize("reader", ["zarr", "xarray", "obstore"])
def test_other_readers_read_the_same_numbers(server, reader):
    import numpy as np

    url = f"{server.url}/v1/zarr/exact"
    headers = {"Authorization": f"Bearer {server.key}"}
    capture = capture_of(server.lake, "exact")
    if reader == "xarray":
        import xarray as xr

        found = xr.open_zarr(url, consolidated=True, storage_options={"headers": headers})
        values, committed = found.mlp_act.values, found.committed.values
    else:
        import zarr

        if reader == "zarr":
            store = zarr.storage.FsspecStore.from_url(url, storage_options={"headers": headers}, read_only=True)
        else:
            from obstore.store import HTTPStore

            client = {"default_headers": headers, "allow_http": True}
            store = zarr.storage.ObjectStore(HTTPStore.from_url(url, client_options=client), read_only=True)
        group = zarr.open_group(store, mode="r", use_consolidated=True)
        values, committed = group["mlp_act"][:], group["committed"][:]
    local = capture.read("mlp_act")
    order = np.argsort(np.flatnonzero(committed), kind="stable")
    keep = values[:, :, np.flatnonzero(committed)][:, :, order]
    slots = capture.snapshot.shard * capture.shard_samples + capture.snapshot.slot
    rank = np.searchsorted(np.sort(slots), slots)
    np.testing.assert_array_equal(keep[:, :, rank], local)
