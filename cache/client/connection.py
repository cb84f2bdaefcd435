"""Connections: who drives the steps of asking, over httpx; one that waits, and one for asyncio."""

import asyncio
import ipaddress
import os
import threading
import time
import uuid
import weakref
from typing import Any
from urllib.parse import urlsplit

from hiddenlake.cache.client.asking import Answer, Ask, Broken, Collect, Failure, Pause, Steps
from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.service import wire

VARIABLE = "HIDDENLAKE_KEY"

# Seconds: until there is a connection, and between two signs of life. A cold read of many shards begins late.
_CONNECT, _SILENCE = 10.0, 60.0


def is_url(where: object) -> bool:
    return isinstance(where, str) and where.lower().startswith(("http://", "https://"))


def check_address(url: str) -> str:
    """An address without a slash at its end. Raises BadInputError, which does not repeat what may be a secret."""
    what = "the address is not of the form http://HOST:PORT: a key is given as connect(..., key=...)"
    try:
        parts = urlsplit(url)
        plain = parts.hostname and parts.port != 0
    except ValueError:
        raise BadInputError(what) from None
    if "@" in parts.netloc:
        raise BadInputError("the address holds a name or a key: leave it out, and give connect(..., key=...)")
    if parts.query or parts.fragment or not plain:
        raise BadInputError(what)
    return url.rstrip("/")


def check_key(key: str | None) -> str:
    """The key that is given, or that of the environment. Raises BadInputError, which does not repeat it."""
    key = os.environ.get(VARIABLE) if key is None else key
    if not key:
        raise BadInputError(
            f"there is no key: give connect(..., key=...), or set {VARIABLE}. `hiddenlake serve` prints one at its start "
            f"where a lake has none, and `hiddenlake keys add LAKE NAME` makes one"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadInputError("the key holds spaces or letters that no key has: copy it again")
    return key


class _Connection:
    """What both have in common. url : of the service, checked.  key : stays in this process."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self._key = check_address(url), check_key(key)
        self.httpx = _import_httpx()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        # A pickle may lie on a disk: whoever opens it has a key of their own, in the environment.
        return type(self), (self.url,)

    def _settings(self) -> dict[str, Any]:
        return {
            "timeout": self.httpx.Timeout(_SILENCE, connect=_CONNECT),
            "follow_redirects": False,  # a key is for one address
            "trust_env": not _is_local(urlsplit(self.url).hostname or ""),  # no proxy leads to this machine
            # Answers are as long as they say, and activations do not get smaller.
            "headers": {"Authorization": f"Bearer {self._key}", "Accept-Encoding": "identity"},
        }

    def _request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """(its id, httpx's arguments)."""
        name = uuid.uuid4().hex
        return name, {
            "method": ask.method, "url": f"{self.url}{ask.path}", "params": ask.params, "json": ask.body,
            "headers": {wire.REQUEST_ID: name},
        }  # fmt: skip

    def _take(self, ask: Ask, name: str, response: Any) -> Any:
        """Where the body goes. Raises StoreError for the answer to another question."""
        good = response.status_code in ask.good
        sink = ask.sink if good else Collect()
        if good and response.headers.get(wire.REQUEST_ID) != name:
            raise StoreError(
                f"{self.url} answered another request than this one: see whether it is the address of `hiddenlake serve`, "
                f"and whether something in between keeps answers"
            )
        if response.headers.get("content-encoding", "identity") != "identity":
            raise StoreError(f"{self.url}: something on the way has compressed the answer: ask the service directly")
        sink.begin(response.headers)
        return sink

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        return self.httpx.TransportError, Broken


class Connection(_Connection):
    """A service, asked by one request after the other; from several threads, by several at once."""

    def __init__(self, url: str, key: str | None = None) -> None:
        super().__init__(url, key)
        self._lock, self._client, self._process = threading.Lock(), None, 0
        _connections.add(self)

    def run(self, steps: Steps) -> Any:
        """Drive steps to their end. Returns what they return, raises what they raise."""
        found = None
        while True:
            try:
                step = steps.send(found)
            except StopIteration as end:
                return end.value
            found = time.sleep(step.seconds) if isinstance(step, Pause) else self._attempt(step)

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _attempt(self, ask: Ask) -> Answer | Failure:
        name, request = self._request(ask)
        try:
            with self._open().stream(**request) as response:
                sink = self._take(ask, name, response)
                for part in response.iter_raw():
                    sink.write(part)
                return Answer(response.status_code, response.headers, sink.finish())
        except self._failures as error:
            return Failure(error)

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self.httpx.Client(**self._settings())
            return self._client

    def forget(self) -> None:
        """In a forked child: two processes on one socket would read each other's answers."""
        self._lock, self._client = threading.Lock(), None


def _forget_all() -> None:
    for connection in list(_connections):
        connection.forget()


_connections: "weakref.WeakSet[Connection]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_all)


class AsyncConnection(_Connection):
    """A service, asked from coroutines of one event loop."""

    _client: Any = None
    _loop: Any = None

    async def run(self, steps: Steps) -> Any:
        """The same as `Connection.run`."""
        found = None
        while True:
            try:
                step = steps.send(found)
            except StopIteration as end:
                return end.value
            found = await (asyncio.sleep(step.seconds) if isinstance(step, Pause) else self._attempt(step))

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _attempt(self, ask: Ask) -> Answer | Failure:
        name, request = self._request(ask)
        try:
            async with self._open().stream(**request) as response:
                sink = self._take(ask, name, response)
                async for part in response.aiter_raw():
                    sink.write(part)
                return Answer(response.status_code, response.headers, sink.finish())
        except self._failures as error:
            return Failure(error)

    def _open(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:  # connections belong to the loop that made them
            self._client, self._loop = self.httpx.AsyncClient(**self._settings()), loop
        return self._client


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise StoreError(f"the client needs httpx ({error}): pip install 'hiddenlake[client]'") from error
    return httpx
