"""Sending: answers in parts, some of which lie in files, from where the kernel copies them itself."""

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response, StreamingResponse

from hiddenlake.cache.store.extents import Extent

# What `Connection` offers: a part of an answer as `extents`. (ASGI's own extension has a message for each of them.)
EXTENTS = "hiddenlake.response.extents"


async def sends_files(request: Request) -> bool:
    """A dependency: whether the server offers it."""
    return EXTENTS in (request.scope.get("extensions") or {})


Files = Annotated[bool, Depends(sends_files)]


async def send_part(send: Any, part: bytes | memoryview | list[Extent], more: bool) -> None:
    """more : whether another part follows."""
    if isinstance(part, list):
        await send({"type": EXTENTS, "extents": part, "more_body": more})
    else:
        await send({"type": "http.response.body", "body": part, "more_body": more})


class Whole(Response):
    """An answer of which everything is there."""

    def __init__(
        self, parts: list[bytes | memoryview | list[Extent]], headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        self._parts = [part for part in parts if part]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for number, part in enumerate(self._parts or [b""], 1):
            await send_part(send, part, more=number < len(self._parts))


class Streamed(StreamingResponse):
    """An answer whose parts are made while it is sent. Parts may be extents if the server offers to send files."""

    async def stream_response(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.body_iterator:
            await send_part(send, part, more=True)
        await send_part(send, b"", more=False)
