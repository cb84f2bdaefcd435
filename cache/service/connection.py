"""Connections: what uvicorn lets a client do for ever, bounded: a head without an end, and an answer that nobody takes."""

import json
import os
import uuid
from asyncio import TimerHandle
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hiddenlake.cache.service.copying import Copy
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.sending import EXTENTS
from hiddenlake.cache.store.extents import size

# Request line and headers.
HEAD_BYTES = 1 << 16

# From a connection's start, or a request's, to the end of its head.
HEAD_SECONDS = 30.0

# In which some byte of what was sent must have been taken.
STUCK_SECONDS = 60.0


class Connection(HttpToolsProtocol):
    """uvicorn's, of one client; and parts of answers that the kernel copies from files, which uvicorn lacks."""

    # Heads that began; whether one comes in, and its bytes, without those of the read that it began in.
    _heads, _in_head, _head = 0, False, 0
    _timer: TimerHandle | None = None
    _waiting: TimerHandle | None = None
    # A second descriptor of its socket, since a loop lets nobody else wait for the one that a transport has; and what is copied.
    _socket: int | None = None
    _copy: Copy | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app = partial(self._with_files, self.app)
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        self._stop_waiting()
        if self._socket is not None:
            if self._copy is not None:
                self._copy.stop()
            os.close(self._socket)
            self._socket = None
        super().connection_lost(error)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads, self._in_head, self._head = self._heads + 1, True, 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop()
        if hasattr(os, "sendfile"):
            self.scope["extensions"] = {EXTENTS: {}}
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._expect_head()  # an empty line, say, which ends uvicorn's own waiting for the next request
        before = self._heads
        super().data_received(data)
        if self._in_head and self._heads == before:
            self._head += len(data)
            if self._head > HEAD_BYTES and not self.transport.is_closing():
                self._refuse(
                    Problem(431, "too_large", f"the headers have more than {HEAD_BYTES} bytes", "send fewer of them")
                )

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "no_http", "what came is no HTTP request", "send one, as HTTP/1.1 has it"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_waiting()
        self._wait(lambda: -self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    async def _with_files(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """The app, in whose answers files may be."""
        cycle = send.__self__

        async def send_any(message: Any) -> None:
            await (self._send_extents(cycle, message) if message["type"] == EXTENTS else send(message))

        await app(scope, receive, send_any)

    async def _send_extents(self, cycle: Any, message: Any) -> None:
        """A part of an answer that has a Content-Length. Raises EOFError where a file ends too early, OSError.

        cycle : uvicorn's, of the request that is answered.
        """
        if cycle.disconnected or self.transport.is_closing():
            return
        length = size(message["extents"])
        if not cycle.response_started or cycle.chunked_encoding or length > cycle.expected_content_length:
            raise RuntimeError("a file is sent where the headers did not say how long the body is")
        cycle.expected_content_length -= length
        # Nothing of what was written before may be left in the transport.
        self.transport.set_write_buffer_limits(0)
        await self.flow.drain()
        if self.transport.is_closing():
            return
        if self._socket is None:
            self._socket = os.dup(self.transport.get_extra_info("socket").fileno())
        copy = self._copy = Copy(self.loop, self._socket, message["extents"])
        try:
            if not copy.done.done():
                self._wait(lambda: copy.copied)
            if not await copy.done:
                self.transport.abort()
                return
        finally:
            self._stop_waiting()
            copy.stop()
            self._copy = None
        self.transport.set_write_buffer_limits()
        if not message["more_body"]:
            await cycle.send({"type": "http.response.body", "body": b""})

    def _expect_head(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, taken: Callable[[], int]) -> None:
        """End the connection if nothing is taken for too long. taken : gives a number that grows as something is."""
        before = taken()

        def look() -> None:
            # Closing would wait until all is taken.
            self.transport.abort() if taken() <= before else self._wait(taken)

        self._waiting = self.loop.call_later(STUCK_SECONDS, look)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse(self, problem: Problem) -> None:
        """Before there is a request that the gate could answer."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # what was written now would be taken for a part of that answer
            return
        id = uuid.uuid4().hex
        body = json.dumps(problem.body(id)).encode()
        head = (
            f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
