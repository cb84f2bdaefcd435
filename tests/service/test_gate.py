"""The gate: nobody unknown gets an answer, every error has one shape, and what comes in is bounded."""

import asyncio
import json
import re
import socket
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.service import gate as gate_module
from hiddenlake.cache.service.app import is_loopback
from hiddenlake.cache.service.gate import OPEN_PATHS
from hiddenlake.cache.service.keys import Caller

from .conftest import PROBLEM, in_process, problem

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
READ = {"capture": "cells", "site": "resid_post"}


def routes(app):
    """(path as it can be asked for, methods) of every route, also of what is mounted."""
    found, left = [], list(app.routes)
    while left:
        route = left.pop()
        left += getattr(route, "routes", None) or getattr(getattr(route, "app", None), "routes", None) or []
        if hasattr(route, "path"):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            found.append((path, sorted(getattr(route, "methods", None) or {"GET"})))
    assert len(found) > 8
    return found


@pytest.fixture(scope="module")
def inner(app):
    """FastAPI's own app, behind the gate."""
    return app.app._app


def test_no_route_answers_without_a_key(app, inner):
    """Whatever the method, and whatever else there may be: `/docs`, a folder of files, a path that does not exist."""
    others = [
        "/",
        "/docs",
        "/redoc",
        "/static/x",
        "/openapi.json",
        "/metrics",
        "/v1",
        "/%2e%2e/healthz",
        "/healthz/",
        "//healthz",
    ]
    for path in {*others, *(path for path, _ in routes(inner))} - OPEN_PATHS:
        for method in METHODS:
            for headers in ({}, {"Authorization": "Bearer hl_wrong"}, {"Authorization": "Basic eDp5"}):
                response = app.request(method, path, headers={"Authorization": ""} | headers)
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"].startswith("Basic")
                if method != "HEAD":
                    problem(response, 401, "no_key")


def test_no_route_answers_a_key_without_a_scope(app, inner):
    with app.parts.database.write() as cursor:
        import hashlib

        hashed = hashlib.sha256(b"none").digest()
        cursor.execute("INSERT INTO keys VALUES ('none', 'none', ?, '', NULL, 0, NULL)", (hashed,))
    app.parts.keys._version = None
    for path, methods in routes(inner):
        if path in OPEN_PATHS:
            continue
        for method in methods:
            body = {"json": READ} if method not in ("GET", "HEAD") else {}
            response = app.request(method, path, headers={"Authorization": "Bearer none"}, **body)
            assert response.status_code == 403, (method, path, response.text)
            if method != "HEAD":
                problem(response, 403, "scope")


def test_healthz_is_open_and_says_nothing(app):
    assert OPEN_PATHS == {"/healthz"}
    response = app.get("/healthz", headers={"Authorization": ""})
    assert (response.status_code, response.text) == (200, "ok\n")


def test_every_error_has_one_shape(app, lake):
    names = app.get("/v1/captures").json()["captures"]
    assert {entry["name"] for entry in names} == {"cells", "tokens", "both", "exact"}  # `theirs` is not ours
    read = lambda **fields: app.post("/v1/activations:read", json=READ | fields)
    problem(app.get("/v1/captures/none"), 404, "not_found")
    problem(app.get("/v1/captures/theirs"), 404, "not_found")
    problem(app.get("/nothing/here"), 404, "not_found")
    problem(app.get("/v1/captures/"), 404, "not_found")
    problem(app.delete("/v1/captures"), 405, "method")
    problem(read(layers=[1]), 409, "not_captured")
    problem(app.get("/v1/zarr/cells/zarr.json", headers={"Range": "bytes=99999999-"}), 416, "range")
    problem(app.get("/v1/captures", headers={"Host": "evil.example"}), 421, "wrong_host")
    problem(read(layers="x"), 422, "bad_input")
    problem(read(capture=None), 422, "bad_input")
    with in_process(lake, max_read="1KB", max_body="1KB", max_rows=5) as small:
        problem(small.post("/v1/activations:read", json=READ), 413, "too_large")
        problem(small.post("/v1/activations:read", content=b" " * 1025), 413, "too_large")
        problem(small.get("/v1/captures/cells/samples", params={"limit": 6}), 422, "bad_input")
    for file in (lake / "cells" / "commits").iterdir():
        file.write_text("{}")
    with in_process(lake) as broken:
        body = problem(broken.get("/v1/captures/cells"), 500, "corrupt")
        assert str(lake) not in json.dumps(body) and "commits/0.json" in body["message"]
        [entry] = [e for e in broken.get("/v1/captures").json()["captures"] if e["name"] == "cells"]
        assert "commits/0.json" in entry["error"] and str(lake) not in entry["error"]


def test_what_nobody_expected_has_the_shape_too_and_no_message(app, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("the prompt was CANARY")

    monkeypatch.setattr(type(app.parts.lake), "captures", fail)
    body = problem(app.get("/v1/captures"), 500, "internal")
    assert "CANARY" not in json.dumps(body)
    [record] = [record for record in caplog.records if record.message == "failed"]
    from hiddenlake.cache.service.logs import _FIELDS, _Formatter

    line = json.loads(_Formatter(_FIELDS).format(record))
    assert "CANARY" not in json.dumps(line) and "RuntimeError" in line["exc_info"]
    assert line["request_id"] == body["request_id"]


@pytest.mark.parametrize("given", ["abc", "A.b_c-1" * 9, "0"])
def test_a_harmless_request_id_is_taken(app, caplog, given):
    caplog.set_level("INFO", "hiddenlake.service")
    response = app.get("/v1/captures/none", headers={"X-Request-Id": given})
    assert problem(response, 404)["request_id"] == given
    assert given in [getattr(record, "request_id", None) for record in caplog.records]


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\tb", "a;b", 'a"b', "<b>", "{}", "é"])
def test_any_other_is_replaced(app, given):
    response = app.get("/v1/captures/none", headers={"X-Request-Id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", problem(response, 404)["request_id"])


@given(value=st.binary(max_size=60))
def test_no_authorization_header_makes_it_fail(app, value):
    """Whatever it is: no key that counts, never an error of ours."""
    for kind in (b"", b"Basic ", b"Bearer ", b"basic  ", b"Negotiate "):
        problem(_call(app.app, "GET", "/v1/captures", [(b"authorization", kind + value)]), 401, "no_key")


def _call(app, method, path, headers, messages=()):
    """One request straight to the app, with headers that no HTTP library would send."""
    sent = []

    async def run():
        left = [*messages, {"type": "http.disconnect"}]

        async def receive():
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost"), *headers], "http_version": "1.1", "scheme": "http", "client": None,
            "server": None, "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(run())
    start, *parts = sent
    body = b"".join(part.get("body", b"") for part in parts)
    return httpx.Response(start["status"], headers=start["headers"], content=body)


@pytest.mark.parametrize(
    "host", ["evil.example", "", "127.0.0.1.evil.example", "localhost.evil", "0.0.0.0", "[::2]:80", "10.0.0.1"]
)
def test_a_name_that_is_not_this_machine_is_refused(app, host):
    problem(app.get("/v1/captures", headers={"Host": host}), 421, "wrong_host")
    problem(app.get("/healthz", headers={"Host": host}), 421, "wrong_host")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LocalHost:8765", "[::1]:9", "127.0.0.1"])
def test_names_of_this_machine_are_not(app, host):
    assert app.get("/v1/captures", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("127.0.0.1.evil.example", False), ("127.x", False), ("10.0.0.1", False), ("", False), ("example.org", False)],
)  # fmt: skip
def test_what_listens_at_this_machine_alone(host, alone):
    assert is_loopback(host) is alone


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_another_sites_page_cannot_use_a_browsers_key(app, site):
    response = app.post("/v1/activations:read", json=READ, headers={"Sec-Fetch-Site": site})
    problem(response, 403, "other_site")


def test_our_own_page_can(app):
    for site in ("same-origin", "none"):
        assert app.post("/v1/activations:read", json=READ, headers={"Sec-Fetch-Site": site}).status_code == 200


def test_no_other_origin_may_read(app):
    response = app.get("/v1/captures", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = app.options("/v1/activations:read", headers=asked)
    assert response.status_code == 405 and not [n for n in response.headers if n.startswith("access-control")]


def test_headers_of_every_answer(server):
    for path, status in (("/healthz", 200), ("/v1/captures", 200), ("/none", 404)):
        headers = server.http.get(path).headers
        assert server.http.get(path).status_code == status
        assert "server" not in headers and headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]


# Bodies.


def chunked(parts):
    yield from parts


@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_large(server, told):
    """Whether it says so beforehand or not."""
    body = json.dumps(READ).encode() + b" " * (9 << 20)
    content = body if told else chunked([body[at : at + 65536] for at in range(0, len(body), 65536)])
    problem(server.http.post("/v1/activations:read", content=content), 413, "too_large")


def test_a_chunked_body_is_read(server):
    body = json.dumps(READ).encode()
    parts = chunked([body[:5], body[5:]])
    response = server.http.post("/v1/activations:read", content=parts, headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"9" * 30, b"9" * 5000, b"", b"x", "²".encode("latin-1")])
def test_a_length_that_is_none(app, length):
    headers = [(b"authorization", f"Bearer {app.key}".encode()), (b"content-length", length)]
    problem(_call(app.app, "POST", "/v1/activations:read", headers), 413, "too_large")


HOSTILE_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep value": b'{"capture": "cells", "site": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not UTF-8": b'{"capture": "\xff\xfe"}',
    "half a pair": b'{"capture": "cells", "site": "\\ud800"}',
    "half a pair in samples": b'{"capture": "cells", "site": "embed", "samples": ["\\udfff"]}',
    "NaN": b'{"capture": "cells", "site": "embed", "samples": [NaN]}',
    "Infinity": b'{"capture": "cells", "site": "resid_post", "layers": [Infinity, -Infinity]}',
    "huge": b'{"capture": "cells", "site": "resid_post", "layers": [' + b"9" * 4000 + b"]}",
    "endless": b'{"capture": "cells", "site": "resid_post", "layers": [' + b"9" * 100_000 + b"]}",
    "beyond 64 bits": b'{"capture": "tokens", "site": "resid_post", "tokens": [1000000000000000000000]}',
    "float": b'{"capture": "cells", "site": "resid_post", "layers": [0.0]}',
    "bool": b'{"capture": "cells", "site": "resid_post", "layers": [true]}',
    "text": b'{"capture": "cells", "site": "resid_post", "layers": ["0"]}',
    "a name too many": b'{"capture": "cells", "site": "embed", "__proto__": {}}',
    "NUL": b'{"capture": "cells\\u0000", "site": "embed"}',
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_a_body_that_means_nothing(app, name):
    response = app.post(
        "/v1/activations:read", content=HOSTILE_BODIES[name], headers={"content-type": "application/json"}
    )
    problem(response, {"NUL": 404, "half a pair in samples": 409}.get(name, 422))


def test_a_body_of_another_type(app):
    body = json.dumps(READ).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
    ):
        problem(app.post("/v1/activations:read", content=body, headers={"content-type": kind}), 422, "bad_input")


@pytest.mark.parametrize(
    "query", ["layr=0", "layer=0&layer=3", "layer=nan", "layer=1e0", "layer=" + "9" * 5000, "check=maybe", "dtype=int8",
              "layer=0&%00=1", "site=embed", "=1"],
)  # fmt: skip
def test_a_query_string_that_means_nothing(app, query):
    """A misspelt `layer` is not all layers."""
    problem(app.get(f"/v1/captures/cells/activations?site=resid_post&{query}"), 422, "bad_input")


# Time, and how many.


def test_a_body_that_comes_too_slowly(app, monkeypatch):
    monkeypatch.setattr(gate_module, "BODY_SECONDS", 0.05)

    async def run():
        sent = []

        async def receive():
            await asyncio.sleep(10)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {app.key}".encode()), (b"content-length", b"5")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/activations:read",
            "headers": headers,
            "query_string": b"",
        }
        await app.app(scope, receive, send)
        return sent

    start, body = asyncio.run(run())
    assert start["status"] == 408 and json.loads(body["body"]).keys() == PROBLEM
    assert not app.app._active


def test_too_many_at_once(app):
    """Of one key; another one is not in its way. The count comes down, however a request ends."""
    gate = app.app
    caller, other = Caller("a", "a", frozenset()), Caller("b", "b", frozenset())
    for _ in range(gate._max_concurrent):
        gate.enter(caller)
    with pytest.raises(Exception) as error:
        gate.enter(caller)
    assert error.value.status == 429 and int(error.value.headers["Retry-After"]) >= 1
    gate.enter(other)
    gate.leave(other)
    for _ in range(gate._max_concurrent):
        gate.leave(caller)
    assert not gate._active


def test_one_key_has_its_share_alone(server, serve, lake):
    """Over sockets: as many slow bodies as may be, one more, and after they hang up."""
    one = serve(lake, "--max-concurrent", "3")
    key = re.search("hl_[A-Za-z0-9_-]+", one.text())[0]
    address = ("127.0.0.1", int(one.url.rpartition(":")[2]))
    head = f"POST /v1/activations:read HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nContent-Length: 5\r\n\r\n"
    slow = [socket.create_connection(address) for _ in range(3)]
    for connection in slow:
        connection.sendall(head.encode())
    headers = {"Authorization": f"Bearer {key}"}
    deadline = time.monotonic() + 60
    while (response := httpx.get(f"{one.url}/v1/captures", headers=headers, timeout=60)).status_code == 200:
        assert time.monotonic() < deadline
    assert problem(response, 429, "too_many_requests") and response.headers["retry-after"] == "1"
    assert httpx.get(f"{one.url}/healthz", timeout=60).status_code == 200
    for connection in slow:
        connection.close()
    while httpx.get(f"{one.url}/v1/captures", headers=headers, timeout=60).status_code != 200:
        assert time.monotonic() < deadline + 60
        time.sleep(0.02)
