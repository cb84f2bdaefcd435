"""Captures whose manifests hold anything: each is read, or refused in words; none is an error that nobody expected."""

import copy
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiddenlake.cache.store.signing import sign

from .conftest import _folder, in_process

ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, float("nan"), float("inf"), "", "x", "../..", "\0", "\ud800", "/etc/passwd",
     [], {}, [None], [[]], {"": None}, ["a"] * 1000, "x" * 10_000, [-1, 0, 1], {"name": float("nan")}]
)  # fmt: skip

ASK = (
    "/v1/captures", "/v1/captures/one", "/v1/captures/one/samples", "/v1/captures/one/tokens?id=3", "/v1/captures/one/grids",
    "/v1/captures/one/activations?site=embed", "/v1/captures/one/activations?site=mlp_act&layer=0", "/v1/zarr/one/zarr.json",
    "/v1/captures/one/samples.parquet",
)  # fmt: skip


def leaves(document, path=()):
    """Paths to every value of a JSON document, inner ones too."""
    yield path
    if isinstance(document, dict | list):
        for name in document if isinstance(document, dict) else range(min(len(document), 3)):
            yield from leaves(document[name], (*path, name))


def changed(document, path, value, how):
    document = copy.deepcopy(document)
    if not path:
        return value
    owner = document
    for name in path[:-1]:
        owner = owner[name]
    if how == "remove":
        del owner[path[-1]]
    elif how == "add" and isinstance(owner[path[-1]], dict):
        owner[path[-1]]["more"] = value
    else:
        owner[path[-1]] = value
    return document


@pytest.fixture(scope="module")
def client(written_lake):
    with _folder() as folder:
        shutil.copytree(written_lake / "both", folder / "lake" / "one")
        shutil.copytree(written_lake / "cells", folder / "lake" / "intact")
        with in_process(folder / "lake") as client:
            client.place = folder / "lake" / "one"
            yield client


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), value=ODD, how=st.sampled_from(["replace", "remove", "add"]), signed=st.booleans())
def test_any_manifest_is_read_or_refused(client, data, value, how, signed):
    file = client.place / data.draw(
        st.sampled_from(["zarr.json", "commits/0.json", "commits/1.json", "mlp_act/zarr.json"])
    )
    before = file.read_bytes()
    document = json.loads(before)
    facts = document.get("attributes", {}).get("hiddenlake")
    inner = facts if facts is not None and data.draw(st.booleans()) else document
    path = data.draw(st.sampled_from(list(leaves(inner))))
    found = changed(inner, path, value, how)
    if signed and isinstance(found, dict) and "crc32c" in found:
        body = {name: part for name, part in found.items() if name != "crc32c"}
        try:
            found = sign(body)
        except UnicodeEncodeError:
            pass
    if inner is facts:
        document["attributes"]["hiddenlake"] = found
        found = document
    file.write_bytes(json.dumps(found).encode("utf-8", "surrogatepass"))
    try:
        client.parts.lake._opened.clear()
        client.parts.lake.refresh("one")
        for url in ASK:
            response = client.get(url)
            assert response.status_code in (200, 404, 409, 500, 503), (url, response.text)
            if response.status_code >= 400:
                body = response.json()
                assert body["type"] in ("corrupt", "store", "not_found", "not_captured"), (url, body)
                assert str(client.place.parent) not in response.text
        assert client.get("/v1/captures/intact").status_code == 200
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("odd", [float("nan"), {"name": float("inf")}, [float("nan")], None, 7, {"id": {"a": "x"}}])
def test_an_identity_may_hold_anything(client, odd):
    file = client.place / "zarr.json"
    before = file.read_bytes()
    document = json.loads(before)
    facts = document["attributes"]["hiddenlake"]
    del facts["crc32c"]
    facts["identity"] |= {"model": odd, "task": odd, "tenant": None}
    document["attributes"]["hiddenlake"] = sign(facts)
    file.write_text(json.dumps(document))
    try:
        client.parts.lake._opened.clear()
        client.parts.lake.refresh("one")
        for url in ASK:
            response = client.get(url)
            assert response.status_code in (200, 404, 409) or response.json()["type"] == "corrupt", (url, response.text)
    finally:
        file.write_bytes(before)


def test_what_a_codec_lost_may_be_no_number(client):
    """And who wrote it may have written anything."""
    file = client.place / "commits" / "0.json"
    before = file.read_bytes()
    body = json.loads(before)
    del body["crc32c"]
    assert body["losses"]
    for loss in body["losses"].values():
        loss["relative"] = float("nan")
    body["provenance"] |= {"odd": [float("inf"), {"a": None}], "\ud800": "\udfff"}
    file.write_text(json.dumps(sign(body)))
    try:
        client.parts.lake._opened.clear()
        found = client.get("/v1/captures/one").json()
        assert found["losses"]["embed"]["relative"] is None
        assert [None, {"a": None}] in [one.get("odd") for one in found["provenance"]]
    finally:
        file.write_bytes(before)


@settings(max_examples=60)
@given(data=st.data())
def test_any_bytes_of_a_manifest(client, data):
    """Bits that flipped, parts that are missing, and what never was JSON."""
    file = client.place / data.draw(st.sampled_from(["zarr.json", "commits/0.json"]))
    before = file.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "noise", "deep"]))
    flipped = before[:at] + bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))]) + before[at + 1 :]
    noise = data.draw(st.binary(max_size=50))
    file.write_bytes({"flip": flipped, "cut": before[:at], "noise": noise, "deep": b'{"a":' * 20_000}[kind])
    try:
        client.parts.lake._opened.clear()
        client.parts.lake.refresh("one")
        for url in ASK:
            response = client.get(url)
            if response.status_code >= 400:
                assert response.json()["type"] in ("corrupt", "store", "not_found", "not_captured"), (
                    url,
                    response.text,
                )
    finally:
        file.write_bytes(before)
