"""What is not checked is sent from its file by the kernel: the same bytes, whoever takes them, however slowly."""

import itertools
import json
import os
import shutil
import socket
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest

from hiddenlake.cache.service import connection as connection_module
from hiddenlake.cache.service import holdings, raw_zarr, reading, reads
from hiddenlake.cache.service import lake as lake_module
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.keys import Keys
from hiddenlake.cache.store import snapshot as snapshot_module
from hiddenlake.cache.store.local import LocalFile
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, TENANT, capture_of, over_socket, post, wait_until_idle, write_capture

ALL = range(SAMPLES)
SAMPLE_LISTS = {"all": None, "reversed": [*ALL][::-1], "some": [1, 2, 3, 7, 8, 12], "one": [5], "twice": [4, 5, 4, 5]}
HTTP = httpx.Client(timeout=60)
LOOPS = ["asyncio", "uvloop"]


class Sends(list):
    """short : how many were not of all that was to be sent."""

    short = 0


@pytest.fixture
def sent(monkeypatch):
    """What os.sendfile gave each time, or the error.

    Runs of any length are extents, and all counts as in memory. (Not every file system says what is.)
    """
    monkeypatch.setattr(snapshot_module, "_EXTENT_BYTES", 0)
    monkeypatch.setattr(LocalFile, "read_cached", lambda self, offset, out: self.read(offset, out) is None)
    found, real = Sends(), os.sendfile

    def sendfile(*arguments):
        try:
            found.append(real(*arguments))
        except OSError as error:
            found.append(error)
            found.short += 1
            raise
        found.short += found[-1] < arguments[-1]
        return found[-1]

    monkeypatch.setattr(os, "sendfile", sendfile)
    return found


@pytest.fixture
def wide(lake, monkeypatch):
    """A capture whose runs are long by themselves: 128 KiB."""
    monkeypatch.setattr(small, "_WIDTHS", {"hidden": 16384, "d_mlp": 8})
    write_capture(lake / "wide", "cells", "bfloat16", "none")
    return lake


def by_kernel(sent, expected):
    """Bytes, of which the last may be with the client before they are noted here."""
    deadline = time.monotonic() + 20
    while (found := sum(one for one in sent if isinstance(one, int))) != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def ask(address, key, **body):
    headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
    response = HTTP.post(f"http://127.0.0.1:{address[1]}/v1/activations:read", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def take(connection, piece=1 << 20, pause=0.0):
    """(head, body, how long the head says it is) of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1) or pytest.fail("closed before an answer began")
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    parts = [body]
    left = length - len(body)
    while left and (part := connection.recv(min(piece, left))):
        parts.append(part)
        left -= len(part)
        time.sleep(pause)
    return head, b"".join(parts), length


@pytest.mark.parametrize("loop", LOOPS)
def test_the_bytes_are_those_that_are_checked(lake, sent, loop):
    """And only those go by the kernel that lie in the file as they are asked for."""
    went = 0
    with over_socket(lake, loop) as (_, address, key):
        for name, (kind, _, codec) in CAPTURES.items():
            if kind == "tokens" or name == "theirs":
                continue
            coverage = capture_of(lake, name).coverage
            for site, samples, format, dtype in itertools.product(
                coverage.sites, SAMPLE_LISTS, ("raw", "safetensors"), ("stored", "float32")
            ):
                body = {"capture": name, "site": site, "format": format, "dtype": dtype}
                one = body | {"positions": [coverage.positions[1]]}
                if site != "embed":
                    one["layers"] = [coverage.layers[-1]]
                for asked in (body, one):
                    if SAMPLE_LISTS[samples] is not None:
                        asked["samples"] = SAMPLE_LISTS[samples]
                    checked = ask(address, key, **asked)
                    assert not sent
                    unchecked = ask(address, key, check=False, **asked)
                    assert unchecked.content == checked.content and len(unchecked.content) > 0
                    same = ("content-length", "x-hiddenlake-shape", "x-hiddenlake-snapshot", "content-type")
                    assert [unchecked.headers[n] for n in same] == [checked.headers[n] for n in same]
                    as_is = codec == "none" and dtype == "stored"
                    values = np.prod([int(n) for n in checked.headers["x-hiddenlake-shape"].split(",")]) * 2
                    expected = int(values) if as_is else 0
                    assert by_kernel(sent, expected) == expected, (asked, sent)
                    went += expected
                    sent.clear()
    assert went > 100_000


def test_short_runs_are_copied(lake, monkeypatch):
    """A system call for each row would cost more."""
    monkeypatch.setattr(os, "sendfile", None)
    with over_socket(lake) as (_, address, key):
        body = {"capture": "cells", "site": "resid_post", "format": "raw"}
        assert ask(address, key, check=False, **body).content == ask(address, key, **body).content


def test_what_is_not_in_memory_is_read_by_a_thread(lake, sent, monkeypatch):
    """The loop, which serves everybody, never waits for a disk."""
    monkeypatch.setattr(LocalFile, "read_cached", lambda self, offset, out: False)
    with over_socket(lake) as (_, address, key):
        body = {"capture": "cells", "site": "resid_post"}
        assert ask(address, key, check=False, **body).content == ask(address, key, **body).content
    assert not sent


@pytest.fixture
def threads(monkeypatch):
    """Requests that a thread has planned. What was looked at once counts as known from then on."""
    found, real = [], reads._begin

    def begin(request, *rest):
        found.append(request)
        return real(request, *rest)

    monkeypatch.setattr(reads, "_begin", begin)
    monkeypatch.setattr(lake_module, "_FRESH_SECONDS", 1000.0)
    monkeypatch.setattr(holdings, "_NOTE_SECONDS", 1000.0)
    return found


def test_what_is_at_hand_takes_no_thread(lake, sent, threads):
    """The second time. By then its capture was looked at, and its file is open."""
    with over_socket(lake) as (_, address, key):
        for site in ("resid_post", "mlp_act", "embed"):
            body = {"capture": "cells", "site": site, "positions": ["last_q"]}
            checked = ask(address, key, **body).content
            sent.clear()
            ask(address, key, check=False, **body)
            size = len(ask(address, key, format="raw", **body).content)
            by_kernel(sent, size)
            for _ in range(3):
                del threads[:], sent[:]
                assert ask(address, key, check=False, **body).content == checked
                assert by_kernel(sent, size) == size and not threads


@pytest.mark.parametrize(
    "body", [{"check": True}, {"samples": [1, 2]}, {"dtype": "float32"}, {"capture": "both"}, {"capture": "tokens", "tokens": "all"}],
    ids=str,
)  # fmt: skip
def test_what_takes_longer_is_a_threads(lake, sent, threads, body):
    body = {"capture": "cells", "site": "resid_post", "check": False} | body
    with over_socket(lake) as (_, address, key):
        for again in range(3):
            ask(address, key, **body)
            assert len(threads) == again + 1


@pytest.mark.parametrize(
    "patch", [(LocalFile, "read_cached", lambda self, offset, out: False), (reads, "_FEW_SAMPLES", SAMPLES - 1),
              (reading, "BLOCK_BYTES", 1000), (holdings, "_NOTE_SECONDS", 0.0), (lake_module, "_FRESH_SECONDS", 0.0),
              (snapshot_module, "find_open", lambda committed: None)], ids=lambda patch: patch[1],
)  # fmt: skip
def test_nor_is_at_hand(lake, sent, threads, monkeypatch, patch):
    """What lies on the disk or is much, and what was not looked at for a while."""
    body = {"capture": "cells", "site": "resid_post"}
    with over_socket(lake) as (_, address, key):
        checked = ask(address, key, **body).content
        assert ask(address, key, check=False, **body).content == checked
        del threads[:]
        assert ask(address, key, check=False, **body).content == checked
        assert not threads
        monkeypatch.setattr(*patch)
        assert ask(address, key, check=False, **body).content == checked
        assert len(threads) == 1


def test_token_indices_are_read_by_a_thread(lake, sent, threads):
    """Once. They are in front of the values, and lie in the store themselves."""
    body = {"capture": "cells", "site": "resid_post", "check": False}
    with over_socket(lake) as (_, address, key):
        for _ in range(3):
            ask(address, key, format="raw", **body)
        assert len(threads) < 3
        del threads[:]
        first = ask(address, key, **body).content
        assert len(threads) == 1
        assert ask(address, key, **body).content == first == ask(address, key, **body | {"check": True}).content
        assert [request.check for request in threads] == [False, True]


def test_what_is_at_hand_is_as_new_and_as_secret_as_all_else(lake, sent, threads, monkeypatch):
    body = {"capture": "theirs", "site": "resid_post", "check": False, "format": "raw"}
    with over_socket(lake) as (_, address, key):
        mine = Keys(Database(lake)).add("mine", "read", TENANT)
        assert ask(address, mine, **body).content == ask(address, mine, **body).content
        del threads[:]
        ask(address, mine, **body)
        assert not threads
        refused = HTTP.post(
            f"http://127.0.0.1:{address[1]}/v1/activations:read", json=body, headers={"Authorization": f"Bearer {key}"}
        )
        assert refused.status_code == 404

        body["capture"] = "cells"
        first = ask(address, key, **body)
        write_capture(lake / "cells", "cells", "bfloat16", "none", samples=SAMPLES + 3)
        monkeypatch.setattr(lake_module, "_FRESH_SECONDS", 0.2)
        time.sleep(0.2)
        more = ask(address, key, **body)
        assert len(more.content) > len(first.content)
        assert more.headers["x-hiddenlake-snapshot"] != first.headers["x-hiddenlake-snapshot"]

        monkeypatch.setattr(lake_module, "_FRESH_SECONDS", 1000.0)
        ask(address, key, **body)
        shutil.rmtree(lake / "cells")
        gone = HTTP.post(
            f"http://127.0.0.1:{address[1]}/v1/activations:read", json=body, headers={"Authorization": f"Bearer {key}"}
        )
        assert gone.status_code == 503 and "removed or replaced" in gone.json()["message"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_slow_client_gets_all_of_it(wide, sent, loop):
    """Many blocks, through a socket that is full most of the time; and a second request that was sent behind the first."""
    body = json.dumps(
        {"capture": "wide", "site": "resid_post", "samples": [*ALL] * 12, "check": False, "format": "raw"}
    )
    short = json.dumps({"capture": "wide", "site": "resid_post", "check": False, "format": "raw"})
    with over_socket(wide, loop) as (running, address, key):
        expected = ask(address, key, **json.loads(body) | {"check": True}).content
        assert len(expected) > 2 * reading.BLOCK_BYTES
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            slow.connect(address)
            slow.settimeout(60)
            slow.sendall(post("/v1/activations:read", key, body) + post("/v1/activations:read", key, short))
            time.sleep(0.3)
            _, got, _ = take(slow, 200_000, 0.001)
            assert got == expected
            _, got, _ = take(slow)
            assert got == ask(address, key, **json.loads(short) | {"check": True}).content
        assert sent.short > 5
        wait_until_idle(running, time.monotonic() + 20)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000])
def test_nonsense_behind_a_request_gets_into_no_answer(wide, sent, check, nonsense):
    """The refusal would be taken for values."""
    body = json.dumps(
        {"capture": "wide", "site": "resid_post", "samples": [*ALL] * 12, "check": check, "format": "raw"}
    )
    with over_socket(wide) as (_, address, key):
        expected = ask(address, key, **json.loads(body) | {"check": True}).content
        with socket.create_connection(address, timeout=20) as slow:
            slow.sendall(post("/v1/activations:read", key, body))
            head, _, got = slow.recv(4096).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            with suppress(ConnectionError):
                slow.sendall(nonsense)
                while part := slow.recv(1 << 20):
                    got += part
            assert expected.startswith(got) and len(got) < len(expected)


@pytest.mark.parametrize("loop", LOOPS)
def test_who_leaves_and_who_never_takes_it(wide, sent, monkeypatch, loop):
    monkeypatch.setattr(connection_module, "STUCK_SECONDS", 0.5)
    body = json.dumps({"capture": "wide", "site": "resid_post", "samples": [*ALL] * 12, "check": False})
    with over_socket(wide, loop) as (running, address, key):
        request = post("/v1/activations:read", key, body)
        ask(address, key, capture="wide", site="resid_post", check=False)
        wait_until_idle(running, time.monotonic() + 20)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with socket.create_connection(address, timeout=20) as leaving:
                leaving.sendall(request)
                leaving.recv(1000)
        deaf = socket.create_connection(address, timeout=20)
        deaf.sendall(request)
        wait_until_idle(running, time.monotonic() + 20)
        deaf.close()
        assert sent.short
        # Threads that came since have the database open; a descriptor of each connection would be more.
        assert len(os.listdir("/proc/self/fd")) < before + 10
        assert ask(address, key, capture="wide", site="resid_post", check=False).content


def test_a_file_that_ends_too_early_breaks_the_connection(lake, sent, monkeypatch):
    """The client is told by the connection, as its length was promised; never by other bytes."""
    body = {"capture": "cells", "site": "resid_post", "check": False, "format": "raw"}
    with over_socket(lake) as (running, address, key):
        whole = ask(address, key, **body).content  # the files are open now
        for file in (lake / "cells" / "resid_post").iterdir():
            if file.name.startswith("c."):
                os.truncate(file, 4096)
        monkeypatch.setattr(reading, "in_memory", lambda extents: True)
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(post("/v1/activations:read", key, json.dumps(body)))
            _, got, length = take(client)
        assert length == len(whole) and len(got) < length and whole.startswith(got)
        monkeypatch.undo()
        refused = httpx.post(
            f"http://127.0.0.1:{address[1]}/v1/activations:read", json=body, headers={"Authorization": f"Bearer {key}"}
        )
        assert refused.status_code == 500 and refused.json()["type"] == "corrupt"
        wait_until_idle(running, time.monotonic() + 20)


def test_files_of_arrays(lake, sent, monkeypatch):
    monkeypatch.setattr(raw_zarr, "_PART_BYTES", 1000)
    write_capture(lake / "big", "tokens", "float32", "zstd", samples=2)
    with over_socket(lake) as (_, address, key):
        capture = capture_of(lake, "big")
        names = [name for name in capture.commits[0].files if not name.startswith("samples/")]
        for name in names:
            there = (lake / "big" / name).read_bytes()
            for first, last in ((0, len(there) - 1), (1, len(there) - 2), (len(there) // 2, len(there) // 2)):
                got = httpx.get(
                    f"http://127.0.0.1:{address[1]}/v1/zarr/big/{name}",
                    headers={"Authorization": f"Bearer {key}", "Range": f"bytes={first}-{last}"},
                )
                assert got.status_code == 206 and got.content == there[first : last + 1]
                assert by_kernel(sent, len(got.content)) == len(got.content)
                sent.clear()
    assert len(names) > 2
