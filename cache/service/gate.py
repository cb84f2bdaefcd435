"""The gate: every request passes it. It names the request, asks for a key, bounds what comes in, counts, and logs."""

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.service.keys import Caller, Keys
from hiddenlake.cache.service.logs import event, logger
from hiddenlake.cache.service.metrics import Metrics
from hiddenlake.cache.service.problems import Problem, problem_of
from hiddenlake.cache.service.sending import EXTENTS
from hiddenlake.cache.service.tracing import Tracer
from hiddenlake.cache.store.extents import size

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What anybody may ask for.
OPEN_PATHS = frozenset({"/healthz"})

# In which a body must be there: whoever sends it more slowly holds one of its key's places for nothing.
BODY_SECONDS = 60.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNAUTHORIZED = {"WWW-Authenticate": 'Basic realm="hiddenlake", charset="UTF-8"'}

# A page of ours runs its own scripts and asks this server alone. (Plotly sets styles of elements by script.)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' "
    "data: blob:; connect-src 'self'; font-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
}


class Gate:
    """An ASGI app in front of another.

    hosts : names by which this server may be called, without ports; None for any.
    lake : its path, which no answer shows.
    A request that passed has `caller` and `request_id` in its scope's state.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        metrics: Metrics,
        lake: str,
        max_body: int,
        max_concurrent: int,
        hosts: Collection[str] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._app, self._keys, self._metrics, self._lake = app, keys, metrics, lake
        self._max_body, self._max_concurrent, self._hosts = max_body, max_concurrent, hosts
        self._tracer = tracer
        self._active: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Request(self, scope, receive, send).answer()
        # websockets are refused: uvicorn answers 403 where nothing accepts them

    def check(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller | None:
        """Who asks; None where anybody may. Raises Problem."""
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            raise Problem(
                421,
                "wrong_host",
                "this server is not called by that name",
                "use the address that it printed at its start",
            )
        if scope["path"] in OPEN_PATHS:
            return None
        caller = self._keys.caller(_key(headers.get(b"authorization", b"")))
        if caller is None:
            self._metrics.logins.inc()
            raise Problem(
                401, "no_key", "no key, or none that counts",
                "send `Authorization: Bearer KEY`; `hiddenlake keys add` makes one", headers=_UNAUTHORIZED,
            )  # fmt: skip
        # A browser sends a key that it knows with whatever any page asks for.
        if scope["method"] not in ("GET", "HEAD") and headers.get(b"sec-fetch-site", b"none") not in (
            b"none", b"same-origin",
        ):  # fmt: skip
            raise Problem(403, "other_site", "another site's page asked for this", "ask from this server's own page")
        return caller

    def enter(self, caller: Caller | None) -> None:
        """Raises Problem for one request of a key too many."""
        if caller is None:
            return
        if self._active[caller.id] >= self._max_concurrent:
            raise Problem(
                429, "too_many_requests", f"{self._max_concurrent} requests of this key are being answered",
                "wait, and ask again", headers={"Retry-After": "1"},
            )  # fmt: skip
        self._active[caller.id] += 1

    def leave(self, caller: Caller | None) -> None:
        if caller is not None:
            self._active[caller.id] -= 1
            if not self._active[caller.id]:
                del self._active[caller.id]


class _Request:
    """One request on its way through."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate, self._scope, self._inner_receive, self._inner_send = gate, scope, receive, send
        self._headers = {name.lower(): value for name, value in scope["headers"]}
        given = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._status, self._sent, self._complete = 0, 0, False
        self._body: bytes | None = b""  # None once it was handed on

    async def answer(self) -> None:
        gate, scope, start = self._gate, self._scope, time.perf_counter()
        caller: Caller | None = None
        gate._metrics.in_progress.inc()
        try:
            caller = gate.check(scope, self._headers)
            self._check_length()
            gate.enter(caller)
            try:
                if not await self._read_body():
                    return
                scope.setdefault("state", {}).update(caller=caller, request_id=self.id)
                await gate._app(scope, self._receive, self._send)
            finally:
                gate.leave(caller)
        except Exception as error:
            # Starlette wraps what is raised after an answer has begun.
            found = error.__cause__ if isinstance(error.__cause__, HiddenlakeError) else error
            if not isinstance(found, HiddenlakeError):
                logger.exception("failed", extra={"request_id": self.id})
            if not self._complete:
                await self._refuse(problem_of(found, gate._lake))
        finally:
            self._note(caller, time.perf_counter() - start)

    def _check_length(self) -> None:
        length = self._headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._gate._max_body:
            raise self._too_large()

    def _too_large(self) -> Problem:
        return Problem(
            413, "too_large", f"the body has more than {self._gate._max_body} bytes", "ask in several smaller requests"
        )

    async def _read_body(self) -> bool:
        """All of it, so that its limits hold whatever the app makes of it. Returns whether the client is still there."""
        if self._headers.keys().isdisjoint((b"content-length", b"transfer-encoding")):
            return True
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await self._inner_receive()
                    if message["type"] == "http.disconnect":
                        return False
                    body += message.get("body", b"")
                    if len(body) > self._gate._max_body:
                        raise self._too_large()
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise Problem(
                408, "slow", f"the body was not there after {BODY_SECONDS:g} s", "ask again, in smaller requests"
            ) from error
        self._body = bytes(body)
        return True

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            return await self._inner_receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            names = {name.lower() for name, _ in message.get("headers", ())}
            ours = _HEADERS | {"X-Request-Id": self.id, "Cache-Control": "no-store"}
            added = [(n.encode(), v.encode()) for n, v in ours.items() if n.lower().encode() not in names]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        else:
            self._sent += size(message["extents"]) if message["type"] == EXTENTS else len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._inner_send(message)

    async def _refuse(self, problem: Problem) -> None:
        if self._status:
            # Half an answer is there: a connection that breaks is what tells the client that the rest is not.
            event("broken off", logging.ERROR, request_id=self.id, type=problem.kind)
            raise ConnectionAbortedError(problem.kind)
        body = json.dumps(problem.body(self.id)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
        await self._send(
            {
                "type": "http.response.start",
                "status": problem.status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            }
        )
        await self._send({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})

    def _note(self, caller: Caller | None, seconds: float) -> None:
        metrics = self._gate._metrics
        metrics.in_progress.dec()
        route = getattr(self._scope.get("route"), "path", "none")
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        metrics.requests.labels(route, method, self._status).inc()
        metrics.seconds.labels(route).observe(seconds)
        metrics.sent.inc(self._sent)
        if self._gate._tracer is not None:
            about = {"http.request.method": method, "http.route": route, "http.response.status_code": self._status,
                     "http.response.body.size": self._sent, "hiddenlake.request_id": self.id}  # fmt: skip
            self._gate._tracer.record(
                f"{method} {route}", seconds, about, headers=self._headers, failed=self._status >= 500
            )
        if logger.isEnabledFor(logging.INFO):
            event(
                "request", request_id=self.id, method=method, route=route, status=self._status,
                ms=round(seconds * 1e3, 2), bytes=self._sent, complete=self._complete,
                key=None if caller is None else caller.id,
            )  # fmt: skip


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _key(authorization: bytes) -> str | None:
    """`Bearer KEY`, or what a browser asks its user for, whose password it is."""
    kind, _, value = authorization.decode("latin-1").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, no text
            return None
    return None


def _host(value: str) -> str:
    """Without the port: `127.0.0.1`, `localhost`, `[::1]`."""
    value = value.lower()
    return value[: value.index("]") + 1] if value.startswith("[") and "]" in value else value.partition(":")[0]
