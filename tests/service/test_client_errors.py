"""The client where something goes wrong: what was asked for, who asks, and what is lost on the way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.client import asking, connection
from hiddenlake.cache.errors import BadInputError, CorruptError, StoreError, UnknownNameError
from hiddenlake.cache.service import problems, wire
from hiddenlake.cache.store.reader import open_capture

from .conftest import SAMPLES, TENANT, add_key, same
from .proxy import SILENCE, answer, proxy

# What goes wrong.


def test_what_is_asked_for_wrongly_is_not_asked(remote, monkeypatch):
    capture = remote.capture("cells")
    monkeypatch.setattr(connection.Connection, "_attempt", None)
    for arguments in [
        ("resid_mid",),
        ("mlp_act", 1),
        ("mlp_act", 0, "last"),
        ("mlp_act", 0, "-1", "nobody"),
        ("mlp_act", 0, "-1", SAMPLES),
    ]:
        with pytest.raises(UnknownNameError, match="it has"):
            capture.read(*arguments)
    with pytest.raises(UnknownNameError, match="has no tokens"):
        capture.read_tokens("mlp_act")
    with pytest.raises(BadInputError, match="holds no tokens"):
        capture.dataset(tokens=True)
    with pytest.raises(ValueError, match="expected"):
        capture.read("mlp_act", out=np.zeros((2, 3, SAMPLES, 40), np.float32))


def test_a_capture_that_is_not_there(remote, local):
    for lake in (remote, local):
        with pytest.raises(StoreError, match="no such capture|has no capture"):
            lake.capture("nothing")
    for name in ("theirs", "..", "a/b", "", "cells?x", "é"):
        with pytest.raises(StoreError):
            remote.capture(name)


def test_a_tenant_sees_their_own(server):
    with hiddenlake.connect(server.url, add_key(server.lake, "them", tenant=TENANT)) as lake:
        assert len(lake.capture("theirs").read("embed", position="last_q")) == SAMPLES


def test_damage_is_a_corrupt_error(lake, serve):
    name = open_capture(lake / "cells").snapshot.layout.data_file("mlp_act", 1)
    raw = bytearray((lake / "cells" / name).read_bytes())
    raw[0] ^= 1
    (lake / "cells" / name).write_bytes(raw)
    one = serve(lake, key=add_key(lake, "x"))
    with hiddenlake.connect(one.url, one.key) as found:
        with pytest.raises(CorruptError, match=r"mlp_act.*\(request [0-9a-f]{32}\)"):
            found.capture("cells").read("mlp_act", 0, "last_q")
        # of what is whole, nothing is lost
        assert found.capture("cells").read("resid_post").shape[2] == SAMPLES


def test_without_a_key(server, monkeypatch):
    monkeypatch.delenv("HIDDENLAKE_KEY", raising=False)
    with pytest.raises(BadInputError, match="no key: give connect"):
        hiddenlake.connect(server.url)
    monkeypatch.setenv("HIDDENLAKE_KEY", server.key)
    with hiddenlake.connect(server.url) as lake:
        assert lake.captures()


def test_a_wrong_key(server):
    with hiddenlake.connect(server.url, "hl_wrong") as lake, pytest.raises(StoreError, match="keys add") as caught:
        lake.captures()
    assert "hl_wrong" not in str(caught.value) + repr(lake)


@pytest.mark.parametrize(
    "url",
    [
        "http://hl_k@localhost:1", "http://:hl_k@localhost:1", "http://localhost:1/?key=hl_k", "http://localhost:1#hl_k",
        "http://localhost:hl_k", "http://localhost:99999", "http://localhost:0", "http://[hl_k", "http://", "http:///hl_k",
    ],
)  # fmt: skip
def test_a_key_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(BadInputError, match="connect\\(..., key=...\\)") as caught:
        hiddenlake.connect(url, "x")
    assert "hl_k" not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "é", "\x00"])
def test_what_is_no_key(key):
    with pytest.raises(BadInputError, match="copy it again"):
        hiddenlake.connect("http://localhost:1", key)


def test_a_key_for_a_folder_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="leave it out"):
        hiddenlake.connect(tmp_path, "hl_x")


def test_no_service_there(quick):
    with hiddenlake.connect("http://127.0.0.1:9", "x") as lake, pytest.raises(StoreError, match="hiddenlake serve"):
        lake.captures()


# What is lost on the way.


@pytest.mark.parametrize("bytes_of_it", [1, 40, 400, 1000, 3000])
def test_a_cut_answer_is_asked_for_again(between, local, quick, bytes_of_it):
    found, capture = between
    expected = local.capture("exact").read("mlp_act")
    assert 1000 < expected.nbytes < 20000
    found.faults = [bytes_of_it, bytes_of_it, bytes_of_it]
    same(capture.read("mlp_act"), expected)
    assert found.connections == 4


@pytest.mark.parametrize("bytes_of_it", [0, 300, 2000])
def test_an_answer_that_is_always_cut_is_an_error(between, quick, bytes_of_it):
    found, capture = between
    found.faults = [bytes_of_it] * asking.ATTEMPTS
    out = np.full((2, 3, SAMPLES, 40), 7, np.float16)
    with pytest.raises(StoreError, match=f"no whole answer after {asking.ATTEMPTS} attempts"):
        capture.read("mlp_act", out=out)
    assert found.connections == asking.ATTEMPTS
    capture.connection.close()
    found.faults = [500] * asking.ATTEMPTS
    with pytest.raises(StoreError, match="no whole answer"):
        capture.samples()


def test_a_server_that_never_answers_is_not_waited_for_for_ever(server, key, quick, monkeypatch):
    monkeypatch.setattr(connection, "_SILENCE", 0.3)
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 1.0)
    with proxy(server.url) as found, hiddenlake.connect(found.url, key) as lake:
        found.faults = [SILENCE] * 20
        start = time.monotonic()
        with pytest.raises(StoreError, match="no whole answer after [2345] attempts"):
            lake.captures()
        assert 1 < time.monotonic() - start < 10 and found.connections < asking.ATTEMPTS
        found.faults = [SILENCE]
        assert lake.captures()


def test_more_at_once_than_a_key_may(lake, serve, quick, monkeypatch):
    """The service turns away what is too much, and in the end everybody has been served."""
    one = serve(lake, "--max-concurrent", "1", key=add_key(lake, "x"))
    turned = []
    monkeypatch.setattr(
        connection.time, "sleep", lambda seconds: turned.append(seconds) or threading.Event().wait(0.02)
    )
    monkeypatch.setattr(asking, "ATTEMPTS", 1000)
    with hiddenlake.connect(one.url, one.key) as there, ThreadPoolExecutor(6) as pool:
        capture, expected = there.capture("exact"), open_capture(lake / "exact").read("mlp_act")
        for found in pool.map(lambda _: capture.read("mlp_act"), range(60)):
            same(found, expected)
    assert turned and min(turned) >= 1  # Retry-After: 1


def test_turned_away_and_then_let_in(between, local, monkeypatch):
    found, capture = between
    waits = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    found.faults = [answer(429, retry_after="3"), answer(503), answer(429, retry_after="0"), answer(502)]
    same(capture.read("mlp_act"), local.capture("exact").read("mlp_act"))
    assert len(waits) == 4 and 3 < waits[0] < 3.3 and all(0.1 <= wait <= 5 for wait in waits[1:])


def test_a_server_that_asks_for_too_long_a_wait_is_told_about(between, monkeypatch):
    found, capture = between
    monkeypatch.setattr(connection.time, "sleep", None)
    found.faults = [
        answer(
            429, b'{"type": "too_many_requests", "message": "m", "remedy": "r", "request_id": "i"}', retry_after="3600"
        )
    ]
    with pytest.raises(StoreError, match=r"m: r \(request i\)"):
        capture.read("mlp_act")


@pytest.mark.parametrize("status", [400, 404, 500, 302, 206, 204])
def test_other_answers_are_not_asked_for_again(between, monkeypatch, status):
    found, capture = between
    monkeypatch.setattr(connection.time, "sleep", None)
    found.faults = [answer(status, location="http://example.invalid/")]
    with pytest.raises(StoreError, match=f"answered {status}|no whole answer"):
        capture.read("mlp_act")
    assert found.connections == 1


def test_an_answer_to_another_request_is_refused(between):
    """What a cache in between, or a mix-up, would give: of the right shape, and of another sample."""
    found, capture = between
    name = capture.snapshot.name
    values = bytes(2 * 40)
    headers = {"X_Hiddenlake_Shape": "1,1,1,40", "X_Hiddenlake_Dtype": "float16", "X_Hiddenlake_Snapshot": name}
    found.faults = [answer(200, values, **headers, X_Request_Id="another"), answer(200, values, **headers)]
    for _ in range(2):
        with pytest.raises(StoreError, match="another request"):
            capture.read("mlp_act", 0, "-1", 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"X-Hiddenlake-Shape": "1,40,1,1"}, {"X-Hiddenlake-Shape": None}, {"X-Hiddenlake-Dtype": "bfloat16"},
        {"X-Hiddenlake-Snapshot": "0" * 32}, {"Content-Length": "79"}, {"Content-Length": "81"},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_is_not_what_was_asked_for_is_refused(remote, wrong):
    headers = {"X-Hiddenlake-Shape": "1,1,1,40", "X-Hiddenlake-Dtype": "float16", "X-Hiddenlake-Snapshot": "1" * 32}
    sink = asking.Fill(memoryview(bytearray(80)), headers)
    good = headers | {"Content-Length": "80"}
    sink.begin(good)
    sink.write(bytes(80))
    sink.finish()
    with pytest.raises(StoreError, match="refresh"):
        sink.begin({name: value for name, value in (good | wrong).items() if value is not None})


def test_too_few_and_too_many_bytes_are_never_taken(remote):
    sink = asking.Fill(memoryview(bytearray(4)), {})
    for parts in ([b"abc"], [b""], [b"ab", b"cde"], [b"abcde"]):
        sink.begin({})
        with pytest.raises(asking.Broken):
            for part in parts:
                sink.write(part)
            sink.finish()


def test_a_compressed_answer_is_refused(between):
    found, capture = between
    found.faults = [answer(404, b"x", content_encoding="gzip")]
    with pytest.raises(StoreError, match="compressed"):
        capture.read("mlp_act")


def test_a_server_that_dies_and_comes_back(lake, serve, monkeypatch):
    """It is killed while it answers; what reads waits for the next one, on the same port."""
    key = add_key(lake, "x")
    one = serve(lake, key=key)
    port = one.url.rpartition(":")[2]
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(asking, "ATTEMPTS", 20)  # however long a start takes here
    with proxy(one.url) as found, hiddenlake.connect(found.url, key) as there:
        capture, expected = there.capture("exact"), open_capture(lake / "exact").read("mlp_act")
        there.close()
        found.faults = [1500]
        started = []

        def die():
            one.process.kill()
            one.process.wait()
            started.append(serve(lake, "--port", port, key=key))

        thread = threading.Thread(target=die)
        thread.start()
        try:
            for _ in range(5):
                same(capture.read("mlp_act"), expected)
                there.close()
        finally:
            thread.join()


def test_a_server_of_another_version(remote, monkeypatch):
    monkeypatch.setattr(wire, "VERSION", 2)
    with pytest.raises(StoreError, match="speaks version 1"):
        remote.capture("cells")


def test_errors_come_back_as_what_they_were():
    """Every exception that the service makes a problem of is the same again for whoever asked, or a StoreError."""
    for error, _, kind, _ in problems._KINDS:
        if error is not hiddenlake.HiddenlakeError:
            assert wire.ERRORS[kind] is error


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("1e9", None),
        ("²", None),
    ],
)
def test_retry_after(value, seconds):
    assert asking._retry_after({"Retry-After": value}) == seconds
