"""Connections: what is no HTTP, what never ends, and who leaves in the middle."""

import json
import re
import socket
import time

import pytest

from hiddenlake.cache.service import connection as connection_module

from .conftest import PROBLEM, over_socket, post, wait_until_idle


def test_headers_without_an_end(server):
    """A head is bounded before anybody is asked for a key."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
        sent = 0
        try:
            while sent < 64 << 20:
                sent += connection.send(b"x" * 65536)
        except OSError:
            pass
        assert sent < 16 << 20
    answer = _raw(server, b"GET /" + b"x" * 70_000)
    if answer:  # else the connection is gone already
        assert answer.startswith(b"HTTP/1.1 431") and json.loads(answer.partition(b"\r\n\r\n")[2]).keys() == PROBLEM


def _raw(server, data, pieces=7):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        answer = b""
        try:
            for at in range(0, len(data), len(data) // pieces + 1):
                connection.sendall(data[at : at + len(data) // pieces + 1])
                time.sleep(0.01)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
        return answer


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET \xff HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rb\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request(server, data):
    answer = _raw(server, data, 1)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 421")), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2]).keys() == PROBLEM
    assert server.http.get("/healthz").status_code == 200


def test_an_empty_line_comes_before_a_request(server):
    """As HTTP allows, also in a read of its own."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(b"\r\n")
        time.sleep(0.2)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert "Error" not in server.text().rpartition("/healthz")[2]


def test_a_websocket_is_refused(server):
    answer = _raw(
        server,
        b"GET /v1/captures HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 401")


def test_connections_that_say_nothing_are_closed(lake, monkeypatch):
    """Nor those that send a head byte by byte, or never take their answer: with limits as short as a test is."""
    monkeypatch.setattr(connection_module, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection_module, "STUCK_SECONDS", 0.3)
    with over_socket(lake) as (running, address, key):
        silent, trickling, deaf = (socket.create_connection(address, timeout=10) for _ in range(3))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"capture": "exact", "site": "mlp_act", "tokens": "all", "samples": [0, 1, 2, 5] * 5000})
        deaf.sendall(post("/v1/activations:read", key, body))
        start = time.monotonic()
        assert silent.recv(10) == b""
        with pytest.raises(OSError):
            for _ in range(200):
                trickling.sendall(b"G")
                time.sleep(0.01)
        wait_until_idle(running, start + 20)
        for one in (silent, trickling, deaf):
            one.close()


def test_clients_that_leave_in_the_middle_leave_nothing(server):
    """Neither threads nor descriptors, nor places."""
    body = json.dumps({"capture": "exact", "site": "mlp_act", "tokens": "all", "samples": [0, 1, 2, 5] * 2000})
    request = post("/v1/activations:read", server.key, body)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))

    def leave(count):
        for _ in range(count):
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(request)
                head = connection.recv(4096)
                assert head.startswith(b"HTTP/1.1 200"), head[:300]
                assert int(re.search(rb"content-length: (\d+)", head)[1]) > 4 << 20

    def threads():
        import psutil

        return psutil.Process(server.process.pid).num_threads()

    leave(20)  # worker threads, and files that stay open
    time.sleep(0.5)
    before = server.descriptors(), threads()
    leave(200)
    deadline = time.monotonic() + 20
    # Pools of threads fill up to what they may hold, which is far less than one for each request.
    while (server.descriptors() > before[0] + 3 or threads() > before[1] + 40) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.descriptors() <= before[0] + 3 and threads() <= before[1] + 40
    while (found := re.findall("^hiddenlake_requests_in_progress (.*)$", server.http.get("/metrics").text, re.M)) != [
        "1.0"
    ]:
        assert time.monotonic() < deadline, found  # the one is this request
        time.sleep(0.1)
