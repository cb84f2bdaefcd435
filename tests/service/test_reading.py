"""Reading: whatever is asked for, it is what the capture itself gives, bit for bit, or an error; and damage is never sent."""

import json
import shutil
import socket
from contextlib import suppress

import httpx
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.service import reading
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.signing import sign
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, add_key, capture_of, in_process, post, problem, write_capture

OURS = [name for name in CAPTURES if name != "theirs"]
SITES_THERE = ("mlp_act", "resid_post", "embed")
RAW = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


def bits(values):
    values = np.ascontiguousarray(values)
    return values.view(np.uint8).tobytes(), values.shape, values.dtype.itemsize


def parse(response, format):
    """(activations, other tensors, metadata); values as bytes whose dtype is named beside them."""
    assert response.status_code == 200, response.text[:1000]
    shape = tuple(int(size) for size in response.headers["x-hiddenlake-shape"].split(",") if size)
    dtype = response.headers["x-hiddenlake-dtype"]
    assert int(response.headers["content-length"]) == len(response.content)
    if format == "raw":
        return np.frombuffer(response.content, RAW[dtype]).reshape(shape), {}, {}
    tensors = dict(safetensors.deserialize(response.content))
    length = int.from_bytes(response.content[:8], "little")
    metadata = json.loads(response.content[8 : 8 + length])["__metadata__"]
    found = tensors.pop("activations")
    assert found["dtype"] == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    values = np.frombuffer(bytes(found["data"]), RAW[dtype]).reshape(found["shape"])
    assert values.shape == shape
    others = {
        name: np.frombuffer(bytes(t["data"]), {"I32": "<i4", "I64": "<i8"}[t["dtype"]]).reshape(t["shape"])
        for name, t in tensors.items()
    }
    return values, others, metadata


some = lambda values: st.none() | st.lists(st.sampled_from(values), max_size=5).map(list)
keys_or_rows = some([*range(SAMPLES), *map(small.key, range(SAMPLES))])
how = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["stored", "float32"]), "format": st.sampled_from(["safetensors", "raw"])}
)


@st.composite
def cells_request(draw):
    site = draw(st.sampled_from(SITES_THERE))
    body = {"capture": draw(st.sampled_from([n for n in OURS if n != "tokens"])), "site": site, **draw(how)}
    if SITES[site].layered:
        body["layers"] = draw(some(small.LAYERS))
    body |= {"positions": draw(some([*small.POSITIONS, -1])), "samples": draw(keys_or_rows)}
    if not draw(st.booleans()):
        body = {name: value for name, value in body.items() if value is not None}
    return body


@settings(max_examples=150)
@given(body=cells_request(), block=st.sampled_from([1, 100, 1000, 5000, 8 << 20]))
def test_cells_are_those_of_the_capture(app, body, block):
    """Any order, repeats, nothing at all, in one block or in hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        values, others, metadata = parse(app.post("/v1/activations:read", json=body), body["format"])
    capture = capture_of(app.lake, body["capture"])
    expected = capture.read(
        body["site"], body.get("layers"), body.get("positions"), body.get("samples"), dtype=body["dtype"]
    )
    assert bits(values) == bits(expected)
    if body["format"] == "safetensors":
        (_, positions, rows), _ = capture.axes(body["site"], None, body.get("positions"), body.get("samples"))
        assert (others["token_index"] == capture.snapshot.cell_tokens[np.ix_(positions, rows)]).all()
        assert json.loads(metadata["samples"]) == [capture.keys[row] for row in rows]
        assert json.loads(metadata["positions"]) == [capture.coverage.positions[p] for p in positions]
        layers = body.get("layers")
        layers = list(small.LAYERS) if layers is None else layers
        assert json.loads(metadata["layers"]) == (layers if SITES[body["site"]].layered else [])
        assert metadata["site"] == body["site"] and metadata["capture"] == body["capture"]


@st.composite
def all_tokens_request(draw):
    site = draw(st.sampled_from(SITES_THERE))
    body = {"capture": draw(st.sampled_from(["tokens", "both", "exact"])), "site": site, "tokens": "all", **draw(how)}
    if SITES[site].layered:
        body["layers"] = draw(some(small.LAYERS))
    return body | {"samples": draw(keys_or_rows)}


@settings(max_examples=60)
@given(body=all_tokens_request(), block=st.sampled_from([1, 1000, 8 << 20]))
def test_all_tokens_are_those_of_the_capture(app, body, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        values, others, _ = parse(app.post("/v1/activations:read", json=body), body["format"])
    capture = capture_of(app.lake, body["capture"])
    expected = capture.read_tokens(body["site"], body.get("layers"), body["samples"], dtype=body["dtype"])
    assert bits(values) == bits(expected.values)
    if body["format"] == "safetensors":
        assert (others["offsets"] == expected.offsets).all() and (others["token_index"] == expected.token_index).all()


def stored_tokens(name, i):
    """The tokens of a sample of which there is an activation."""
    one = small.sample(i, () if CAPTURES[name][0] == "tokens" else small.POSITIONS)
    if CAPTURES[name][0] == "cells":
        return {token for token in one.token_index if token >= 0}, one.total_length
    return set(range(one.total_length)), one.total_length


@st.composite
def some_tokens_request(draw):
    site = draw(st.sampled_from(SITES_THERE))
    name = draw(st.sampled_from(OURS))
    samples = draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=4))
    there = [stored_tokens(name, i) for i in samples]
    from_start = set.intersection(*(tokens for tokens, _ in there))
    from_end = set.intersection(*({token - total for token in tokens} for tokens, total in there))
    tokens = draw(st.lists(st.sampled_from(sorted(from_start | from_end)), max_size=5))
    body = {"capture": name, "site": site, "tokens": tokens, "samples": samples, **draw(how)}
    if SITES[site].layered:
        body["layers"] = draw(some(small.LAYERS))
    return body


@settings(max_examples=150)
@given(body=some_tokens_request(), block=st.sampled_from([1, 500, 8 << 20]))
def test_tokens_are_those_of_the_capture_wherever_they_are_stored(app, body, block):
    """By index from the start or the end; from positions where only those are stored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        values, others, _ = parse(app.post("/v1/activations:read", json=body), body["format"])
    capture = capture_of(app.lake, body["capture"])
    site, layers, dtype = body["site"], body.get("layers"), body["dtype"]
    expected, index = [], []
    for i in body["samples"]:
        total = small.sample(i, ()).total_length
        at = [token + total if token < 0 else token for token in body["tokens"]]
        if capture.coverage.tokens:
            rows = capture.read_tokens(site, layers, [i], dtype=dtype).values[..., at, :]
        else:
            positions = [small.sample(i, small.POSITIONS).token_index.index(token) for token in at]
            rows = capture.read(site, layers, [small.POSITIONS[p] for p in positions], i, dtype=dtype)
        expected.append(rows)
        index.append(at)
    assert bits(values) == bits(np.stack(expected, axis=-3))
    if body["format"] == "safetensors":
        assert others["token_index"].tolist() == index


@pytest.mark.parametrize("name", ["both", "exact"])
@pytest.mark.parametrize("site", SITES_THERE)
def test_a_token_is_the_same_row_by_position_and_by_index(app, name, site):
    read = lambda **fields: parse(app.post("/v1/activations:read", json={"capture": name, "site": site} | fields), "")[
        0
    ]
    by_position = read(positions=["-1"], format="safetensors")
    by_index = read(tokens=[-1])
    assert bits(by_position[..., 0, :, :]) == bits(by_index[..., 0, :])


def test_one_cell_by_get(app):
    capture = capture_of(app.lake, "cells")
    query = {"site": "resid_post", "layer": 3, "position": "last_q", "format": "raw"}
    values, _, _ = parse(app.get("/v1/captures/cells/activations", params=query), "raw")
    assert bits(values) == bits(capture.read("resid_post", [3], ["last_q"]))
    values, _, _ = parse(app.get("/v1/captures/cells/activations", params={"site": "embed"}), "safetensors")
    assert bits(values) == bits(capture.read("embed"))


NOT_THERE = {
    "site": {"capture": "cells", "site": "resid_mid"},
    "layer": {"capture": "cells", "site": "resid_post", "layers": [0, 1]},
    "layer of a site without": {"capture": "cells", "site": "embed", "layers": [0]},
    "position": {"capture": "cells", "site": "resid_post", "positions": ["last_q", "first_answer"]},
    "key": {"capture": "cells", "site": "resid_post", "samples": ["key-9999"]},
    "row": {"capture": "cells", "site": "resid_post", "samples": [0, SAMPLES]},
    "negative row": {"capture": "cells", "site": "resid_post", "samples": [-1]},
    "positions of tokens": {"capture": "tokens", "site": "resid_post"},
    "all tokens of positions": {"capture": "cells", "site": "resid_post", "tokens": "all"},
    "token": {"capture": "cells", "site": "resid_post", "tokens": [0]},
    "token behind the end": {"capture": "tokens", "site": "resid_post", "tokens": [40]},
    "token before the start": {"capture": "tokens", "site": "resid_post", "tokens": [-40]},
    "absent as a token": {"capture": "cells", "site": "resid_post", "tokens": [-36, -1]},
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_was_not_captured_is_said_with_what_was(app, case):
    body = problem(app.post("/v1/activations:read", json=NOT_THERE[case]), 409, "not_captured")
    c = capture_of(app.lake, NOT_THERE[case]["capture"]).coverage
    there = body["there"]
    assert there["sites"] == [*c.sites, "embed"] and there["layers"] == list(c.layers)
    assert there["positions"] == list(c.positions) and there["samples"] == SAMPLES
    assert there["tokens"] == (None if c.tokens is None else "all")
    if "tokens" in NOT_THERE[case] and NOT_THERE[case]["tokens"] != "all":
        assert there["token_index"] == sorted(stored_tokens(NOT_THERE[case]["capture"], 0)[0])


def test_both_positions_and_tokens(app):
    body = {"capture": "both", "site": "embed", "tokens": [0], "positions": ["-1"]}
    problem(app.post("/v1/activations:read", json=body), 422, "bad_input")


LARGE = {
    "values": {"site": "resid_post", "layers": [0, 3] * 2000, "positions": ["-1"] * 4000, "samples": [1] * 5000},
    "tokens": {"capture": "tokens", "site": "embed", "tokens": [0] * 60_000, "samples": [1] * 200_000},
    "all tokens": {"capture": "tokens", "site": "embed", "tokens": "all", "samples": [5] * 900_000},
    "no layers, many indices": {"site": "resid_post", "layers": [], "positions": ["-1"] * 4000, "samples": [1] * 100_000},
    "no layers, many tokens": {"capture": "exact", "site": "mlp_act", "layers": [], "tokens": [0] * 60_000, "samples": [1] * 90_000},
    "no layers, all tokens": {"capture": "exact", "site": "mlp_act", "layers": [], "tokens": "all", "samples": [5] * 900_000},
    "keys": {"site": "resid_post", "layers": [], "positions": [], "samples": [1] * 1_000_000},
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_too_much_is_refused_before_memory_is_taken(app, case):
    import tracemalloc

    body = json.dumps({"capture": "cells"} | LARGE[case]).encode()
    send = lambda: app.post("/v1/activations:read", content=body, headers={"content-type": "application/json"})
    tracemalloc.start()
    try:
        problem(send(), 413, "too_large")
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


# Damage.


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("format", ["safetensors", "raw"])
def test_damage_in_the_first_block_is_said(lake, format):
    [file] = (lake / "cells" / "embed").glob("c.*0.0")
    flip(file, 100)
    with in_process(lake) as client:
        body = problem(
            client.post("/v1/activations:read", json={"capture": "cells", "site": "embed", "format": format}), 500
        )
        assert body["type"] == "corrupt" and "cells/embed" in body["message"]
        assert str(lake) not in json.dumps(body) and str(lake.parent) not in json.dumps(body)
        # what is not touched by it is there as ever
        values, _, _ = parse(client.post("/v1/activations:read", json={"capture": "cells", "site": "mlp_act"}), "")
        assert bits(values) == bits(capture_of(lake, "cells").read("mlp_act"))


def test_damage_further_on_breaks_the_connection(lake, serve, tmp_path):
    """Never a complete body, over a real socket; and the next request is answered."""

    big = lake / "big"
    write_capture(big, "tokens", "float32", "none", samples=60)
    one = serve(lake, key=add_key(lake, "tests"))
    body = {"capture": "big", "site": "mlp_act", "tokens": "all", "samples": [*range(60)] * 170, "format": "raw"}
    whole = one.http.post("/v1/activations:read", json=body)
    assert whole.status_code == 200 and len(whole.content) > 3 * reading.BLOCK_BYTES
    snapshot = capture_of(lake, "big").snapshot
    shards = [
        set(snapshot.layout.token_shards_of(int(start), int(length)))
        for start, length in zip(snapshot.token_start, snapshot.token_length, strict=True)
    ]
    bad = min(shards[-1])
    good = [row for row in range(60) if bad not in shards[row]]
    file = lake / "big" / snapshot.layout.token_data_file("mlp_act", bad)
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    enough = 2 * reading.BLOCK_BYTES // (40 * 4) // int(snapshot.token_length[good].sum()) + 1
    late = body | {"samples": good * enough + [59]}
    with one.http.stream("POST", "/v1/activations:read", json=late) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete|without sending complete"):
            for _ in response.iter_raw():
                pass
    problem(one.http.post("/v1/activations:read", json=body | {"samples": [59]}), 500, "corrupt")
    assert one.http.get("/v1/captures").status_code == 200
    [line] = [json.loads(line) for line in one.text().splitlines() if "broken off" in line]
    assert line["type"] == "corrupt" and line["request_id"]
    assert str(lake) not in "".join(line for line in one.text().splitlines() if line.startswith("{"))


def test_without_checks_damage_goes_through(lake):
    """So that a test above would fail if checks were off."""
    [file] = (lake / "cells" / "embed").glob("c.*0.0")
    flip(file, 100)
    with in_process(lake) as client:
        body = {"capture": "cells", "site": "embed", "check": False, "format": "raw"}
        assert client.post("/v1/activations:read", json=body).status_code == 200


# Changes.


def fresh(client, name):
    """Have the service look again, as it does every second."""
    client.parts.lake.refresh(name)


def test_a_capture_that_grows(lake):
    with in_process(lake) as client:
        read = lambda: parse(client.post("/v1/activations:read", json={"capture": "cells", "site": "resid_post"}), "")
        before, _, metadata = read()
        write_capture(lake / "cells", "cells", "bfloat16", "none", samples=SAMPLES + 9)
        fresh(client, "cells")
        after, _, then = read()
        assert after.shape[2] == SAMPLES + 9 and bits(after[:, :, :SAMPLES]) == bits(before)
        assert metadata["snapshot"] != then["snapshot"]


def test_a_capture_that_is_removed(lake):
    with in_process(lake) as client:
        body = {"capture": "cells", "site": "resid_post"}
        assert client.post("/v1/activations:read", json=body).status_code == 200
        shutil.rmtree(lake / "cells")
        assert client.post("/v1/activations:read", json=body).status_code in (404, 503)
        fresh(client, "cells")
        problem(client.post("/v1/activations:read", json=body), 404, "not_found")


def test_a_capture_that_is_replaced_while_it_is_read(lake, monkeypatch):
    """What was planned of the old one is never filled with the new one's bytes."""
    write_capture(lake / "new", "cells", "bfloat16", "none", other=1)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    with in_process(lake) as client:
        body = {"capture": "cells", "site": "resid_post"}
        capture = client.parts.lake.capture("cells", client.parts.keys.caller(client.key))
        from hiddenlake.cache.errors import StoreError
        from hiddenlake.cache.service.read_request import ReadRequest

        blocks = reading.plan_reading(capture, ReadRequest(**body), 1 << 30).blocks(False)
        next(blocks)
        shutil.rmtree(lake / "cells")
        (lake / "new").rename(lake / "cells")
        with pytest.raises(StoreError):
            list(blocks)
        fresh(client, "cells")
        assert client.post("/v1/activations:read", json=body).status_code == 200


def test_a_tenants_capture_that_takes_anothers_place(lake):
    """Whose it is, is asked of the capture that is read, not of the one that had its name a moment ago."""
    with in_process(lake) as client:
        body = {"capture": "cells", "site": "resid_post"}
        assert client.post("/v1/activations:read", json=body).status_code == 200
        shutil.rmtree(lake / "cells")
        (lake / "theirs").rename(lake / "cells")
        opened = client.parts.lake._opened["cells"]
        opened.when = -1e9  # the list of captures is still the old one
        problem(client.post("/v1/activations:read", json=body), 404, "not_found")


def test_tenants_see_their_own_and_everybodys(lake):
    with in_process(lake, "read", "them") as client:
        assert {e["name"] for e in client.get("/v1/captures").json()["captures"]} == set(CAPTURES)
        assert client.post("/v1/activations:read", json={"capture": "theirs", "site": "embed"}).status_code == 200
    with in_process(lake, "admin", "others") as client:
        assert {e["name"] for e in client.get("/v1/captures").json()["captures"]} == set(OURS)
        absent = problem(client.get("/v1/captures/none"), 404)
        for path in ("", "/samples", "/samples/key-0001", "/tokens?id=3", "/activations?site=embed"):
            there = problem(client.get(f"/v1/captures/theirs{path}"), 404)
            assert there["message"] == absent["message"] and there["remedy"] == absent["remedy"]
        problem(client.get("/v1/zarr/theirs/zarr.json"), 404)
        problem(client.post("/v1/activations:read", json={"capture": "theirs", "site": "embed"}), 404)


# Captures that lie (S4).


@pytest.mark.parametrize(
    "lie",
    [{"shard_samples": 1 << 40}, {"shard_samples": 1 << 16}, {"codec": "pickle"},
     {"coverage": {"widths": {"embed": 1 << 40, "mlp_act": 1 << 40, "resid_post": 1 << 40}}},
     {"coverage": {"widths": {"embed": 1 << 22, "mlp_act": 1 << 22, "resid_post": 1 << 22}}},
     {"coverage": {"layers": list(range(100_000))}}, {"coverage": {"sites": ["../../etc"]}}],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_memory_is_taken(lake, lie):
    import psutil

    file = lake / "cells" / "zarr.json"
    document = json.loads(file.read_text())
    facts = document["attributes"]["hiddenlake"]
    del facts["crc32c"]
    facts["coverage"] |= lie.get("coverage", {})
    facts |= {name: value for name, value in lie.items() if name != "coverage"}
    document["attributes"]["hiddenlake"] = sign(facts)
    file.write_text(json.dumps(document))
    with in_process(lake) as client:
        before = psutil.Process().memory_info().rss
        for path in ("/v1/captures/cells", "/v1/captures/cells/samples", "/v1/zarr/cells/zarr.json"):
            problem(client.get(path), 500, "corrupt")
        problem(client.post("/v1/activations:read", json={"capture": "cells", "site": "embed"}), 500, "corrupt")
        assert client.get("/v1/captures").status_code == 200
        assert psutil.Process().memory_info().rss - before < 100 << 20


def test_a_commit_that_claims_absurd_files(lake):
    import psutil

    for file in (lake / "cells" / "commits").iterdir():
        body = json.loads(file.read_text())
        del body["crc32c"]
        for record in body["files"].values():
            record["size"] = 1 << 60
        file.write_text(json.dumps(sign(body)))
    with in_process(lake) as client:
        before = psutil.Process().memory_info().rss
        problem(client.post("/v1/activations:read", json={"capture": "cells", "site": "embed"}), 500, "corrupt")
        with suppress(KeyError):
            files = client.get("/v1/zarr/cells/embed/c.0.0.0")
            assert files.status_code in (404, 500)
        assert psutil.Process().memory_info().rss - before < 100 << 20


def test_the_socket_says_so_when_a_body_is_not_whole(lake, serve):
    """The client is told by the connection alone: the headers said how long the body is."""
    one = serve(lake, key=add_key(lake, "tests"))
    body = json.dumps({"capture": "exact", "site": "mlp_act", "tokens": "all", "samples": [5] * 8000})
    with socket.create_connection(("127.0.0.1", int(one.url.rpartition(":")[2]))) as connection:
        connection.sendall(post("/v1/activations:read", one.key, body))
        head = connection.recv(65536)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        shutil.rmtree(lake / "exact")  # in the middle
        received = len(head.partition(b"\r\n\r\n")[2])
        with suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                received += len(part)
        assert length > 16 << 20 and received < length
