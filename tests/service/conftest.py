"""A lake of every kind of capture, served: by a real process over a socket, and in this process for many small requests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hiddenlake import connect
from hiddenlake.cache.client import asking
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.testing import small

from .proxy import proxy

SAMPLES = 13
START_SECONDS = 60

# name -> (what is stored, dtype, codec)
CAPTURES = {
    "cells": ("cells", "bfloat16", "none"),
    "tokens": ("tokens", "float32", "zstd"),
    "both": ("both", "bfloat16", "fp8"),
    "exact": ("both", "float16", "none"),
    "theirs": ("cells", "bfloat16", "none"),  # of the tenant `them`
}
TENANT = "them"


def consistent_cells(i: int, c: Any) -> dict[str, np.ndarray]:
    """A sample's cells as a model gives them: each is the row of its token, wherever else that is stored."""
    index = np.array(small.sample(i, c.positions).token_index, np.int64)
    found = {}
    for site, rows in small.tokens(i, c).items():
        values = np.take(rows, np.where(index == ABSENT, 0, index), axis=-2)
        values.view(DTYPES[c.dtype][0])[..., index == ABSENT, :] = DTYPES[c.dtype][2]
        found[site] = values
    assert all(SITES[site].layered == (values.ndim == 3) for site, values in found.items())
    return found


def write_capture(folder: Path, kind: str, dtype: str, codec: str, samples: int = SAMPLES, **identity: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "cells", consistent_cells)
        patch.setattr(small, "IDENTITY", small.IDENTITY | identity)
        small.write(open_backend(folder), samples, kind, dtype, codec)


@pytest.fixture(scope="session")
def written_lake() -> Iterator[Path]:
    """Captures, one of each kind. Do not change them: see `lake`."""
    with _folder() as folder:
        for name, (kind, dtype, codec) in CAPTURES.items():
            tenant = {"tenant": TENANT} if name == "theirs" else {}
            write_capture(folder / name, kind, dtype, codec, **tenant)
        import pyarrow as pa

        capture = open_capture(folder / "cells")
        rare = [None if i % 4 == 0 else i / 2 if i % 4 == 1 else float("nan") for i in range(SAMPLES)]
        add_label(capture, "judge", pa.table({"key": capture.keys, "judge": rare}))
        add_label(capture, "kind", pa.table({"key": capture.keys[:5], "kind": ["x", "y", "x", "true", ""]}))
        yield folder


@pytest.fixture
def lake(written_lake: Path) -> Iterator[Path]:
    """A copy of one's own."""
    with _folder() as folder:
        shutil.copytree(written_lake, folder / "lake")
        yield folder / "lake"


@contextmanager
def _folder() -> Iterator[Path]:
    """In memory where there is one: thousands of fsyncs wait for whoever else uses the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hiddenlake-test-", dir=memory) as folder:
        yield Path(folder)


def hiddenlake(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """The command, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "hiddenlake.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **variables},
    )  # fmt: skip


def add_key(lake: Path, name: str, scope: str = "read", tenant: str | None = None) -> str:
    """By the command, as a user makes it."""
    done = hiddenlake("keys", "add", lake, name, "--scope", scope, *(("--tenant", tenant) if tenant else ()))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass
class Served:
    """A server in a process of its own. log : its stderr.  started : seconds until it answered."""

    lake: Path
    log: Path
    key: str | None
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen = field(init=False)
    url: str = field(init=False)
    started: float = field(init=False)

    def start(self) -> "Served":
        start = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hiddenlake.cli", "serve", str(self.lake), "--port", "0", *self.options],
                stdout=log, stderr=log, env={**os.environ, **self.variables},
            )  # fmt: skip
        while True:
            assert self.process.poll() is None and time.monotonic() - start < START_SECONDS, self.text()
            if " at http://" in (text := self.text()):
                self.url = text.split(" at ")[1].split()[0]
                try:
                    httpx.get(f"{self.url}/healthz", timeout=60).raise_for_status()
                    break
                except httpx.TransportError:
                    pass
            time.sleep(0.02)
        self.started = time.monotonic() - start
        return self

    @property
    def http(self) -> httpx.Client:
        """A client that has the key."""
        if not hasattr(self, "_http"):
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self._http

    def text(self) -> str:
        """What it has said and logged."""
        return self.log.read_text(errors="replace")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """By SIGTERM. Returns how it ended."""
        if hasattr(self, "_http"):
            self._http.close()
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """serve(lake, *options, key=..., **variables) -> a running Served, stopped when the test ends."""
    running: list[Served] = []

    def start(lake: Path, *options: str, key: str | None = None, **variables: str) -> Served:
        running.append(Served(lake, tmp_path / f"server-{len(running)}.log", key, options, variables))
        return running[-1].start()

    yield start
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def server(written_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for a module, over a copy of the lake, with a key of scope admin."""
    with _folder() as folder:
        shutil.copytree(written_lake, folder / "lake")
        key = add_key(folder / "lake", "tests", "admin")
        running = Served(folder / "lake", tmp_path_factory.mktemp("server") / "log", key).start()
        yield running
        running.stop()


@contextmanager
def in_process(lake: Path, scope: str | None = "admin", tenant: str | None = None, **settings: Any) -> Iterator[Any]:
    """The app in this process: a starlette TestClient, which has a key, `parts`, and `app`."""
    from starlette.testclient import TestClient

    from hiddenlake.cache.service.app import make_app
    from hiddenlake.cache.service.serving import make_parts
    from hiddenlake.cache.service.settings import load_settings
    from hiddenlake.probing.service.routers import make_routers

    parts = make_parts(lake, load_settings(settings)[0])
    app = make_app(parts, make_routers(lake))
    key = parts.keys.add("tests", scope, tenant) if scope else ""
    headers = {"Authorization": f"Bearer {key}"} if scope else {}
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False, headers=headers) as client:
        client.parts, client.key = parts, key
        yield client


@contextmanager
def over_socket(lake: Path, loop: str = "auto") -> Iterator[tuple[Any, tuple[str, int], str]]:
    """The app in this process, behind a socket, where its limits can be set: (uvicorn's server, its address, a key)."""
    import uvicorn

    from hiddenlake.cache.service.app import make_app
    from hiddenlake.cache.service.connection import Connection
    from hiddenlake.cache.service.serving import make_parts
    from hiddenlake.cache.service.settings import load_settings

    parts = make_parts(lake, load_settings({})[0])
    config = uvicorn.Config(make_app(parts), http=Connection, loop=loop, ws="none", log_config=None, lifespan="on")
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield running, listening.getsockname(), parts.keys.add("tests")
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_until_idle(running: Any, deadline: float) -> None:
    """Until a server has neither connections nor requests."""
    while running.server_state.connections or running.server_state.tasks:
        assert time.monotonic() < deadline, running.server_state.connections
        time.sleep(0.05)


def post(path: str, key: str, body: str) -> bytes:
    """A request as its bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@pytest.fixture(scope="module")
def app(written_lake: Path) -> Iterator[Any]:
    """`in_process`, for a module; its captures are not to be changed."""
    with _folder() as folder:
        shutil.copytree(written_lake, folder / "lake")
        with in_process(folder / "lake") as client:
            client.lake = folder / "lake"
            yield client


def capture_of(lake: Path, name: str) -> Capture:
    return open_capture(lake / name)


PROBLEM = {"type", "message", "remedy", "request_id"}


def problem(response: Any, status: int, kind: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error, which has the one shape."""
    assert response.status_code == status, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() - {"there"} == PROBLEM and all(body[name] for name in PROBLEM), body
    assert body["request_id"] == response.headers["x-request-id"]
    assert kind is None or body["type"] == kind, body
    return body


# Clients of `server`.


@pytest.fixture(scope="module")
def key(server):
    return add_key(server.lake, "reader")


@pytest.fixture(scope="module")
def remote(server, key):
    with connect(server.url, key) as lake:
        yield lake


@pytest.fixture(scope="module")
def local(server):
    return connect(server.lake)


@pytest.fixture
def quick(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.001)


@pytest.fixture
def between(server, key):
    """(Proxy, capture through it, whose next request makes a connection)."""
    with proxy(server.url) as found, connect(found.url, key) as lake:
        capture = lake.capture("exact")
        lake.close()
        found.connections = 0
        yield found, capture


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()
