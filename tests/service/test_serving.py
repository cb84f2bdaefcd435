"""Serving, from start to end."""

import socket
import time

import httpx
import pytest

from hiddenlake.cache.service import serving

from .conftest import hiddenlake


@pytest.mark.slow
def test_it_starts_within_two_seconds(server, serve):
    """From the start of the process to the first answer. One of several tries must do, since the machine is shared."""
    seconds = []
    while not seconds or (min(seconds) >= 2.0 and len(seconds) < 8):
        one = serve(server.lake, key=server.key)
        seconds.append(one.started)
        one.stop()
    assert min(seconds) < 2.0, seconds


def test_it_answers_and_ends_by_sigterm(server, serve):
    one = serve(server.lake, key=server.key)
    assert one.http.get("/v1/captures").status_code == 200
    start = time.monotonic()
    assert one.stop() == 0
    assert time.monotonic() - start < 10
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{one.url}/healthz", timeout=60)
    assert "Traceback" not in one.text()


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="this system does not say how it sends")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_what_stays_on_this_machine_is_not_paced(host):
    """And what leaves it is sent as its administrator has it."""

    def how(one):
        return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

    with socket.socket() as other:
        usual = how(other)
    with serving._listen(host, 0) as listening:
        with socket.create_connection(listening.getsockname()[:2], timeout=20):
            taken, _ = listening.accept()
            with taken:
                assert how(taken) == (usual if host == "0.0.0.0" else b"reno")


def test_a_port_that_is_taken(server):
    done = hiddenlake("serve", server.lake, "--port", server.url.rpartition(":")[2])
    assert done.returncode and "cannot listen at 127.0.0.1" in done.stderr and "--port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("lake", ["/nowhere/at/all", "s3://bucket/lake", __file__])
def test_a_lake_that_cannot_be_served(lake):
    done = hiddenlake("serve", lake, "--port", "0")
    assert done.returncode and lake in done.stderr and "Traceback" not in done.stderr
