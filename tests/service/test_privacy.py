"""Privacy: no text of a prompt, an answer, a key or a request is in a log, a metric, an error, or the database."""

import base64
import json
import re
from urllib.parse import quote

import httpx
import pytest

from hiddenlake.cache.testing import small

from .conftest import add_key, write_capture

CANARY = "xyzzyCanary42"
FORMS = {CANARY, CANARY.lower(), CANARY[::-1], CANARY.encode().hex(), base64.b64encode(CANARY.encode()).decode()[:-4]}


# What a lake without a worker says.
STORE = ("store", "no_worker")


def leaks(text):
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    return [form for form in FORMS if form in text]


@pytest.fixture
def planted(lake, monkeypatch):
    """A capture whose every text is the canary's."""
    sample = small.sample

    def with_canary(i, positions):
        import dataclasses

        texts = {"prompt": f"{CANARY} {i}", "answer": f"so {CANARY}", "answers": (CANARY,), "group": f"{CANARY} group"}
        return dataclasses.replace(sample(i, positions), **texts)

    with monkeypatch.context() as patch:
        patch.setattr(small, "sample", with_canary)
        write_capture(lake / "planted", "both", "bfloat16", "none")
    import pyarrow as pa

    from hiddenlake.cache.store.labels import add_label
    from hiddenlake.cache.store.reader import open_capture

    capture = open_capture(lake / "planted")
    add_label(capture, "note", pa.table({"key": capture.keys, "note": [CANARY] * len(capture)}))
    return lake


def requests(key):
    """(method, path, what else) of requests, right and wrong, that carry the canary where a text may stand."""
    read = {"capture": "planted", "site": "resid_post"}
    yield "GET", "/v1/captures/planted", {}
    for params in ({"text": CANARY}, {"label": "group", "value": f"{CANARY} group"}, {"label": "note", "value": CANARY}, {"key": CANARY},
                   {"label": CANARY, "value": "x"}, {"limit": CANARY}, {CANARY: "1"}, {"text": CANARY * 100}, {"label": CANARY}):  # fmt: skip
        yield "GET", "/v1/captures/planted/samples", {"params": params}
    for path in ("captures/{}", "captures/{}/samples", "captures/planted/samples/{}", "captures/planted/tokens?id={}", "zarr/planted/{}",
                 "zarr/{}/zarr.json", "captures/planted/activations?site={}", "captures/planted/activations?site=embed&{}=1", "{}",
                 "captures/planted/activations?site=mlp_act&position={}", "jobs/{}", "jobs/{}/events", "captures/planted/labels/{}",
                 "captures/planted/samples.parquet?columns={}"):  # fmt: skip
        yield "GET", f"/v1/{path.format(CANARY)}", {}
        yield "DELETE", f"/v1/{path.format(quote('../' + CANARY, safe=''))}", {}
    for fields in ({"site": CANARY}, {"positions": [CANARY]}, {"samples": [CANARY]}, {"layers": [CANARY]}, {"tokens": CANARY}, {CANARY: 1},
                   {"capture": CANARY}, {"dtype": CANARY}, {"format": [CANARY]}, {"check": CANARY}, {"site": [CANARY] * 3}, {"site": CANARY * 30},
                   {"tokens": [[CANARY]]}, {"snapshot": CANARY}, {"tokens": {CANARY: CANARY}}, {"layers": {CANARY: [1]}}):  # fmt: skip
        yield "POST", "/v1/activations:read", {"json": read | fields}
    given = {"text": CANARY}
    for body in ({"inputs": [given]}, {"inputs": [{"messages": [{"role": "user", "content": CANARY}]}]}, {"inputs": [given], "model": CANARY},
                 {"inputs": [given | {"answer": CANARY}]}, {"inputs": [given | {CANARY: 1}]}, {"inputs": [{"messages": [{"role": CANARY, CANARY: 1}]}]},
                 {"inputs": CANARY}, {"inputs": [given], "positions": [CANARY]}, {"inputs": [given], "sites": [CANARY]}, {"inputs": [CANARY]},
                 {"inputs": [given], "generation": {"stop": [CANARY]}}, {"inputs": [given], "generation": {CANARY: CANARY}},
                 {"inputs": [given | {"token_ids": [CANARY]}]}, {"inputs": [given], "layers": [CANARY]}, {"inputs": [given], "only_if_cached": True}):  # fmt: skip
        yield "POST", "/v1/activations:resolve", {"json": body}
    typed = {"content-type": "application/json"}
    for content in (
        f'{{"{CANARY}',
        f'"{CANARY}"',
        f"[{CANARY}]",
        f'{{"capture": "{CANARY}" "',
        CANARY,
        f'{{"capture": {CANARY}}}',
    ):
        yield "POST", "/v1/activations:read", {"content": content.encode(), "headers": typed}
        yield "POST", "/v1/activations:resolve", {"content": content.encode(), "headers": typed}
    yield "POST", "/v1/activations:read", {"content": CANARY.encode(), "headers": {"content-type": CANARY}}
    yield "POST", "/v1/activations:read", {"content": CANARY.encode() * 800_000}
    basic = base64.b64encode(f"{CANARY}:{CANARY}".encode()).decode()
    for headers in ({"Authorization": f"Bearer hl_{CANARY}"}, {"Authorization": f"Basic {basic}"}, {"Authorization": CANARY}, {"Cookie": CANARY},
                    {"Host": CANARY}, {"User-Agent": CANARY}, {"Referer": CANARY}, {"X-Request-Id": f"{CANARY} x"}, {"Range": CANARY},
                    {"If-None-Match": CANARY}, {"Sec-Fetch-Site": CANARY}, {"Content-Type": CANARY}, {"X-Forwarded-For": CANARY}):  # fmt: skip
        yield "GET", "/v1/captures", {"headers": headers}
        yield "POST", "/v1/activations:read", {"headers": headers, "json": read}
        yield "GET", "/v1/zarr/planted/zarr.json", {"headers": headers}
    yield "POST", f"/{CANARY}", {"headers": {"Authorization": ""}, "content": CANARY}
    yield CANARY.upper(), "/v1/captures", {}


def offer_a_model(lake):
    """As a worker does that starts; its model's tokenizer cannot be read."""
    from hiddenlake.cache.service.database import Database
    from hiddenlake.cache.service.plans import Offer
    from hiddenlake.cache.service.work import Work

    identity = {
        "model": "m",
        "revision": "r",
        "weights_hash": "0",
        "compute_dtype": "float32",
        "stored_dtype": "float32",
    }
    widths = {"embed": 8, "resid_post": 8}
    offer = Offer("/nowhere/at/all", identity, ("resid_post",), (0, 1), widths, "float32", 100, 100, 1000)
    Work(Database(lake)).join("worker", offer)


def test_no_text_is_where_it_should_not_be(planted, serve):
    """Log level debug, and requests of every kind, over a socket."""
    key = add_key(planted, "tests", "admin")
    offer_a_model(planted)
    one = serve(planted, "--log-level", "debug", key=key)
    statuses, errors = set(), 0
    for method, path, more in requests(key):
        response = one.http.request(method, path, **more)
        statuses.add(response.status_code)
        assert response.status_code < 500 or response.json()["type"] in STORE, (method, path, more, response.text)
        assert "/nowhere" not in response.text and str(planted) not in response.text
        assert not leaks(str(response.headers)), (method, path, more)
        if response.status_code >= 400:
            errors += 1
            assert not leaks(response.content), (method, path, more, response.text)
        elif method == "GET" and "text" in more.get("params", {}):
            assert leaks(response.content)  # what is asked for is there
    assert {200, 401, 404, 409, 413, 421, 422} <= statuses and errors > 60
    raw = httpx.Client(base_url=one.url)
    for data in (f"{CANARY}\r\n\r\n", f"GET /{CANARY} HTTP/9\r\n\r\n", f"GET / HTTP/1.1\r\n{CANARY}\r\n\r\n"):
        import socket

        with socket.create_connection(("127.0.0.1", int(one.url.rpartition(":")[2]))) as connection:
            connection.sendall(data.encode())
            assert not leaks(connection.recv(65536))
    raw.close()
    metrics = one.http.get("/metrics").text
    assert "hiddenlake_requests_total" in metrics and not leaks(metrics) and key not in metrics
    assert not leaks(one.http.get("/openapi.json").text)
    one.stop()
    text = one.text()
    assert text.count('"request"') > 100 and not leaks(text) and key not in text
    for file in (planted / ".hiddenlake").iterdir():
        data = file.read_bytes()
        assert not leaks(data) and key.encode() not in data, file


def test_the_search_finds_what_it_looks_for():
    assert all(leaks(f"..{form}..") for form in FORMS) and not leaks("xyzzy")


def test_logs_are_one_object_a_line(planted, serve):
    """With what is needed to follow a request, and nothing of what it was."""
    one = serve(planted, "--log-level", "debug", key=add_key(planted, "tests"))
    id = one.http.get("/v1/captures/none?x=1", headers={"X-Request-Id": "follow.me-1"}).json()["request_id"]
    one.http.get("/v1/captures/planted/samples", params={"text": CANARY})
    one.stop()
    lines = [json.loads(line) for line in one.text().splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line.get("request_id") == id == "follow.me-1"]
    assert line.keys() == {
        "time",
        "level",
        "event",
        "request_id",
        "method",
        "route",
        "status",
        "ms",
        "bytes",
        "complete",
        "key",
    }
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/captures/{name}", 422)
    assert re.fullmatch("[0-9a-f]{8}", line["key"])


def test_metrics_have_labels_of_ours_alone(app):
    """Whatever paths and methods clients make up, there are as many numbers as there are routes."""
    for i in range(30):
        app.get(f"/made/up/{i}")
        app.request(f"MADE{i}", "/v1/captures")
        app.get(f"/v1/captures/made-{i}")
    text = app.get("/metrics").text
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert routes <= {route.path for route in app.app._app.routes} | {"none"}
    assert set(re.findall(r'method="([^"]*)"', text)) <= {
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "other",
    }


def test_metrics_count(app):
    def value(name):
        [found] = re.findall(rf"^hiddenlake_{name} (.*)$", app.get("/metrics").text, re.M)
        return float(found)

    read, refused = value("read_bytes_total"), value("refused_keys_total")
    whole = app.post("/v1/activations:read", json={"capture": "cells", "site": "embed", "format": "raw"})
    app.get("/v1/captures", headers={"Authorization": "x"})
    assert value("read_bytes_total") - read == len(whole.content)
    assert value("refused_keys_total") - refused == 1
    assert 'route="/v1/activations:read",status="200"' in app.get("/metrics").text.replace('method="POST",', "")
