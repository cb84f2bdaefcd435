"""Traces: a request and a turn are spans that a collector gets, and nothing of what was asked is in them."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from .conftest import add_key, hiddenlake
from .working import OPTIONS, chat

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

CANARY = "marzipan"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collecting(status=200):
    """An address that takes spans over OTLP: (it, the bodies that came)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            bodies.append(body)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()


def spans(bodies):
    """(service, span, its attributes) of all that came."""
    for body in bodies:
        for part in collector.ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in part.resource.attributes}["service.name"]
            for scope in part.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    yield service, span, values


def test_a_request_belongs_to_the_trace_that_asked(lake, serve):
    with collecting() as (address, bodies):
        server = serve(lake, "--traces", f"{address}/", key=add_key(lake, "tests", "admin"))
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        assert server.http.get("/v1/captures", headers=headers).status_code == 200
        assert server.http.get(f"/v1/captures/{CANARY}?{CANARY}=1", headers={"traceparent": CANARY}).status_code == 422
        body = {"capture": "cells", "site": "embed", "samples": [CANARY]}
        assert server.http.post("/v1/activations:read", json=body).status_code == 409
        assert server.stop() == 0
    found = {(v["http.route"], v["http.response.status_code"]): (span, v) for _, span, v in spans(bodies)}
    span, values = found["/v1/captures", 200]
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("GET /v1/captures", TRACE, PARENT)
    assert values["hiddenlake.request_id"] == "mine" and values["http.request.method"] == "GET"
    assert values["http.response.body.size"] > 100 and 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert found["/v1/captures/{name}", 422][0].trace_id.hex() != TRACE
    assert ("/v1/activations:read", 409) in found and ("/healthz", 200) in found
    assert {service for service, _, _ in spans(bodies)} == {"hiddenlake-serve"}
    assert CANARY.encode() not in b"".join(bodies)


def test_nothing_waits_for_a_collector_that_is_not_there(lake, serve):
    with collecting() as (address, _):
        pass
    server = serve(lake, "--traces", address, key=add_key(lake, "tests", "admin"))
    assert server.http.get("/v1/captures").status_code == 200
    start = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - start < 30
    assert server.key not in server.text()


def test_without_opentelemetry_an_error_says_what_to_install(lake, tmp_path):
    (tmp_path / "opentelemetry.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    done = hiddenlake("serve", lake, "--port", "0", "--traces", "http://127.0.0.1:1", PYTHONPATH=path)
    assert done.returncode == 1 and "pip install 'hiddenlake[otel]'" in done.stderr and "Traceback" not in done.stderr
    done = hiddenlake("serve", lake, "--traces", "localhost")
    assert done.returncode == 1 and "traces" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_turn_of_a_worker_is_a_span(tiny_model, tmp_path):
    lake, log = tmp_path / "lake", tmp_path / "log"
    lake.mkdir()
    key = add_key(lake, "tests", "compute")
    command = ["up", str(lake), "--model", str(tiny_model), "--port", "0", *OPTIONS]
    with collecting() as (address, bodies), log.open("wb") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HIDDENLAKE_TRACES": address}
        up = subprocess.Popen(
            [sys.executable, "-m", "hiddenlake.cli", *command], stdout=out, stderr=out, env=environment
        )
        try:
            end = time.monotonic() + 120
            while " at http://" not in log.read_text():
                assert up.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            url = log.read_text().split(" at ")[1].split()[0]
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
                body = {"inputs": [chat(CANARY)], "generation": {"max_new_tokens": 3}, "wait": 60}
                response = http.post("/v1/activations:resolve", json=body)
                while response.status_code in (404, 503) and time.monotonic() < end:  # no worker yet
                    time.sleep(0.5)
                    response = http.post("/v1/activations:resolve", json=body)
                assert response.status_code == 200, response.text
        finally:
            up.send_signal(signal.SIGTERM)
            assert up.wait(60) == 0
    [(span, values)] = [(span, values) for service, span, values in spans(bodies) if service == "hiddenlake-worker"]
    assert span.name == "turn" and values["hiddenlake.answers"] == 1 and values["hiddenlake.failures"] == 0
    assert values["hiddenlake.capture"].startswith("resolved-") and values["hiddenlake.tokens"] == 3
    assert CANARY.encode() not in b"".join(bodies)
