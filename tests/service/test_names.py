"""Names and paths that clients send: looked up, never joined; whatever they are, nothing outside is opened and nothing changes."""

import json
import os
import sys
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hiddenlake.cache.service.lake import NAME

from .conftest import PROBLEM, in_process, problem

SEGMENTS = [
    "..", ".", "...", "", "%2e%2e", "%2e", "..%2f", "..%5c", "%252e%252e", "..\\", "\\", "%00", "\0", "~", "etc", "passwd",
    "cells", "theirs", "zarr.json", "samples", "0.parquet", "commits", "0.json", ".hiddenlake", "service.sqlite", "secret",
    "C:", "//", "file:", "http:", "%c0%ae%c0%ae", "%u002e", "．．", "‥", "ｃells", "cells\u200b", "ce\u0301lls", "٣", "x" * 300,
    "con", "-", "--help", "*", "?", "[a-z]*", "$HOME", "`id`", "'", '"', "<script>", "\r\nX: y", "\u202e", "😀", "cells ", " cells",
    "CELLS", "cells.", "cells/",
]  # fmt: skip

names = st.one_of(
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=6).map("/".join),
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map("".join),
    st.text(max_size=40),
)
encoded = st.one_of(
    names.map(lambda name: quote(name, safe="/%.\\")),  # what is encoded stays as it is
    names.map(lambda name: quote(name, safe="")),
    names.map(lambda name: "/" + quote(name, safe="/")),
    st.binary(max_size=20).map(quote_from_bytes),
)

ROUTES = [
    "/v1/captures/{}", "/v1/captures/{}/samples", "/v1/captures/cells/samples/{}", "/v1/captures/{}/samples.parquet",
    "/v1/captures/cells/labels/{}", "/v1/captures/{}/labels/kind", "/v1/captures/{}/tokens?id=3",
    "/v1/captures/{}/activations?site=embed", "/v1/zarr/{}/zarr.json", "/v1/zarr/cells/{}", "/v1/zarr/{}", "/v1/jobs/{}",
    "/v1/jobs/{}/events", "/{}", "/v1/{}", "/page/{}", "/v1/captures/{}/grids", "/v1/captures/cells/grids/{}",
    "/v1/captures/{}/grids/cells", "/v1/captures/cells/grids/{}/cell?layer=0&position=-1", "/v1/probes/{}",
    "/v1/captures/cells/samples/{}/pieces", "/v1/captures/{}/samples/key-0001/pieces",
]  # fmt: skip


class Watched:
    """Which files this process opens, lists or changes, while `on`."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.on and event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.link",
            "os.symlink",
        ):
            for argument in arguments[:2]:
                if isinstance(argument, str | bytes | os.PathLike):
                    self.seen.append((event, os.path.realpath(os.fsdecode(argument))))


@pytest.fixture(scope="module")
def watched():
    return Watched()


@pytest.fixture(scope="module")
def client(written_lake, tmp_path_factory):
    """A lake with what tempts beside and inside it."""
    import shutil

    folder = tmp_path_factory.mktemp("names")
    (folder / "secret").write_text("SECRET")
    lake = folder / "lake"
    shutil.copytree(written_lake, lake)
    (lake / "secret").write_text("SECRET")
    (lake / "cells" / "secret").write_text("SECRET")
    (lake / "cells" / "embed" / "secret").write_text("SECRET")
    (lake / "cells" / "link").symlink_to(folder / "secret")
    (lake / "cells" / "embed" / "c.link").symlink_to(folder / "secret")
    (lake / "cells" / "out").symlink_to(folder)
    (lake / "cells" / "resid_post" / "c.0.0.99.0").write_text("SECRET")  # as a shard that is not committed
    (lake / ".cells").mkdir()
    shutil.copytree(lake / "cells", lake / ".hidden", symlinks=True)
    with in_process(lake, "compute") as client:
        client.folder, client.lake = folder, lake
        client.get("/v1/captures")  # whatever is imported late
        client.get("/v1/captures/cells/samples")
        client.get("/v1/captures/cells/samples.parquet")
        client.before = contents(lake)
        yield client
    assert contents(lake) == client.before


def contents(lake):
    """Of every file but the database, which may be checkpointed."""
    return {
        str(path.relative_to(lake)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in lake.rglob("*")
        if ".hiddenlake" not in path.parts
    }


def check(client, watched, response):
    assert 200 <= response.status_code < 500
    assert b"SECRET" not in response.content and str(client.folder).encode() not in response.content
    if response.status_code >= 400:
        assert response.json().keys() - {"there"} == PROBLEM
    inside = [str(client.lake / name) for name in ("cells", "both", "tokens", "exact", "theirs", ".hiddenlake")]
    # Where `demo` and `paper` put them: `Findings` says so.
    inside += [str(client.folder / name) for name in ("grids", "probes")]
    for event, path in watched.seen:
        if path.startswith(str(client.folder)) and path != str(client.lake):
            assert path.startswith(tuple(inside)), (event, path)
            assert Path(path).name not in ("secret", "link", "c.link", "out", "c.0.0.99.0"), (event, path)
        assert not path.startswith(("/etc/", "/root/", "/home/")) or "site-packages" in path, (event, path)


def ask(client, watched, method, url, **kwargs):
    watched.seen, watched.on = [], True
    try:
        return client.request(method, url, **kwargs)
    finally:
        watched.on = False


@settings(max_examples=250)
@given(route=st.sampled_from(ROUTES), name=encoded, method=st.sampled_from(["GET", "GET", "HEAD", "DELETE"]))
@example("/v1/zarr/cells/{}", "../cells/zarr.json", "GET")
@example("/v1/zarr/cells/{}", "..%2fcells%2fzarr.json", "GET")
@example("/v1/zarr/cells/{}", "%2e%2e/%2e%2e/secret", "GET")
@example("/v1/zarr/{}/zarr.json", "..%2fcells", "GET")
@example("/v1/zarr/cells/{}", "/etc/passwd", "GET")
@example("/v1/zarr/cells/{}", "embed//zarr.json", "GET")
@example("/v1/zarr/cells/{}", "embed/./zarr.json", "GET")
@example("/v1/captures/{}", "%ff%fe", "GET")
def test_no_name_leads_anywhere(client, watched, route, name, method):
    try:
        response = ask(client, watched, method, route.format(name))
    except Exception as error:
        # httpx itself sends no such URL
        assert type(error).__module__.startswith("httpx") or isinstance(error, UnicodeError), error
        return
    if method == "HEAD":
        assert response.status_code < 500 and not response.content
        return
    check(client, watched, response)


@settings(max_examples=150)
@given(
    name=st.one_of(names, st.text(max_size=200)),
    where=st.sampled_from(["capture", "site", "positions", "samples", "model"]),
)
def test_no_name_in_a_body_does(client, watched, name, where):
    body = {"capture": "cells", "site": "embed"} | (
        {where: [name]} if where in ("positions", "samples") else {where: name}
    )
    route = "/v1/activations:read"
    if where == "model":
        route, body = "/v1/activations:resolve", {"model": name, "inputs": [{"token_ids": [1]}], "only_if_cached": True}
    if name in ("cells", "both", "exact", "embed", "-1", "tokens"):
        return
    response = ask(
        client, watched, "POST", route, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    check(client, watched, response)
    assert response.status_code >= 400


@settings(max_examples=100)
@given(query=names, field=st.sampled_from(["site", "position", "label", "value", "text", "key", "columns"]))
def test_no_name_in_a_query_does(client, watched, query, field):
    path = {"site": "activations", "position": "activations", "columns": "samples.parquet"}.get(field, "samples")
    more = {"position": {"site": "mlp_act"}, "label": {"value": "x"}, "value": {"label": "group"}}.get(field, {})
    response = ask(client, watched, "GET", f"/v1/captures/cells/{path}", params={field: query, **more})
    check(client, watched, response)


@pytest.mark.parametrize(
    "path",
    ["secret", "embed/secret", "link", "embed/c.link", "out/secret", "out/lake/cells/zarr.json", "resid_post/c.0.0.99.0",
     "samples/0.parquet", "commits/0.json", "claims/0", "labels/kind.parquet", "writers/lock", "", "embed", "embed/",
     "../.hiddenlake/service.sqlite", "../../secret", "zarr.json/", "ZARR.JSON", "./zarr.json", "embed/../zarr.json"],
)  # fmt: skip
def test_what_is_not_a_committed_array_is_not_there(client, watched, path):
    for url in {f"/v1/zarr/cells/{path}", f"/v1/zarr/cells/{quote(path, safe='')}", f"/v1/zarr/cells/{path}%00"}:
        response = ask(client, watched, "GET", url)
        # a path is made plain by the HTTP client before it is sent
        if response.request.url.path != "/v1/zarr/cells/zarr.json":
            problem(response, 404, "not_found")
        check(client, watched, response)


@pytest.mark.parametrize("name", [".hiddenlake", ".hidden", ".cells", "theirs", "secret", "", "lake", "..", "."])
def test_what_is_no_capture_of_ours_is_not_there(client, watched, name):
    assert name not in [entry["name"] for entry in client.get("/v1/captures").json()["captures"]]
    for route in ROUTES[:2] + ROUTES[8:9]:
        response = ask(client, watched, "GET", route.format(quote(name, safe="")))
        if not response.request.url.path.endswith(("/v1/captures", "/v1/captures/samples", "/v1/captures/")):
            problem(response, 404)
        check(client, watched, response)


@given(st.text(max_size=130))
@example("a" * 129)
@example("a\n")
@example("٣")
@example("ａ")
@example("a/../b")
def test_what_a_name_may_look_like(name):
    if NAME.fullmatch(name):
        assert name.isascii() and 1 <= len(name) <= 128 and name[0].isalnum() and not set(name) & set("/\\\0\n %~")
        assert os.path.normpath(name) == name


def test_the_watch_sees_what_is_opened(watched, tmp_path):
    watched.seen, watched.on = [], True
    try:
        (tmp_path / "x").write_text("")
        os.listdir(tmp_path)
    finally:
        watched.on = False
    assert ("open", str(tmp_path / "x")) in watched.seen and ("os.listdir", str(tmp_path)) in watched.seen
