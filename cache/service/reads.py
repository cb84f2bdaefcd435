"""Routes that give activations."""

import os
import time
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from typing import Annotated, Any, Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from hiddenlake.cache.service import wire
from hiddenlake.cache.service.app import By, Parts, With, need, problems
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.read_request import ReadRequest
from hiddenlake.cache.service.reading import Block, Reading, plan_reading
from hiddenlake.cache.service.sending import Files, Streamed, Whole
from hiddenlake.cache.store.extents import size

router = APIRouter(tags=["activations"], dependencies=[need("read")])

_MEDIA = {"safetensors": "application/vnd.safetensors", "raw": "application/octet-stream"}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in _MEDIA.values()}}
}


@router.post(
    "/v1/activations:read",
    summary="Activations by (site, layer, position or token, sample)",
    response_class=Response,
    responses=_CONTENT | problems(404, 409, 413, 500, 503),
)
async def read(request: ReadRequest, parts: With, caller: By, files: Files) -> Response:
    """Streamed, C order. Every block is checked before it is sent; damage ends the connection, never the check.

    As safetensors: `activations` (layer, position, sample, width), `token_index` (position, sample), and, as metadata, the
    names along the axes. As raw bytes: the values alone, and `X-Hiddenlake-Shape` and `-Dtype`. `X-Hiddenlake-Snapshot`
    names the moment that samples were numbered at, and `-Commits` those that hold samples which were named.
    """
    return await _answer(request, parts, caller, files)


@router.get(
    "/v1/captures/{name}/activations",
    summary="One (layer, position) of all samples",
    response_class=Response,
    responses=_CONTENT | problems(404, 409, 413, 500, 503),
)
async def read_cell(
    name: str,
    parts: With,
    caller: By,
    files: Files,
    site: Annotated[str, Query(max_length=64, examples=["mlp_out"])],
    layer: int | None = None,
    position: Annotated[str | None, Query(max_length=64, examples=["exact_answer_last"])] = None,
    dtype: Literal["stored", "float32"] = "stored",
    format: Literal["safetensors", "raw"] = "safetensors",
    check: bool = True,
) -> Response:
    """The matrix of which probes are made, for a browser or curl. Without a layer or a position, all of them."""
    try:
        request = ReadRequest(
            capture=name, site=site, dtype=dtype, format=format, check=check,
            layers=None if layer is None else (layer,), positions=None if position is None else (position,),
        )  # fmt: skip
    except ValidationError as error:  # a name that is too long, say
        raise RequestValidationError(error.errors()) from error
    return await _answer(request, parts, caller, files)


async def _answer(request: ReadRequest, parts: Parts, caller: Caller, files: bool) -> Response:
    reading, blocks, first = await run_sync(_begin, request, parts, caller, files, limiter=_limiter(_readers(parts)))
    headers = {
        "Content-Length": str(reading.nbytes),
        wire.SHAPE: ",".join(map(str, reading.shape)),
        wire.DTYPE: reading.dtype,
        wire.SNAPSHOT: reading.snapshot,
    }
    if reading.commits is not None:
        headers[wire.COMMITS] = reading.commits

    if len(reading.head) + _size(first) == reading.nbytes:
        return Whole([reading.head, first or b""], headers, _MEDIA[request.format])

    async def body() -> AsyncIterator[bytes | Block]:
        if reading.head:
            yield reading.head
        block = first
        while block is not None:
            yield block
            block = await run_sync(_next, blocks, parts, limiter=_limiter(_readers(parts)))

    return Streamed(body(), headers=headers, media_type=_MEDIA[request.format])


def _readers(parts: Parts) -> int:
    """Reads at once: as many as there are cores, which more would only wait for, and what is far away as many as it is worth.

    (64 clients, 4 MB each, two cores: 231 a second by 2 threads, 181 by 40.)
    """
    place = parts.lake.place
    return place.parallel if "://" in str(place) else max(2, len(os.sched_getaffinity(0)))


@lru_cache
def _limiter(readers: int) -> CapacityLimiter:
    return CapacityLimiter(readers)


def _begin(
    request: ReadRequest, parts: Parts, caller: Caller, files: bool
) -> tuple[Reading, Iterator[Block], Block | None]:
    """The first block is read before the answer begins, so that what is wrong there is said in words."""
    capture = parts.lake.capture(request.capture, caller)
    parts.holdings.use(request.capture)
    try:
        reading = plan_reading(capture, request, parts.settings.max_read)
    except Problem as problem:
        if problem.kind != "not_captured":
            raise
        # A sample, perhaps, that was committed a moment ago.
        parts.lake.refresh(request.capture)
        reading = plan_reading(parts.lake.capture(request.capture, caller), request, parts.settings.max_read)
    blocks = reading.blocks(files)
    return reading, blocks, _next(blocks, parts)


def _next(blocks: Iterator[Block], parts: Parts) -> Block | None:
    start = time.perf_counter()
    block = next(blocks, None)
    if block is not None:
        parts.metrics.read_seconds.observe(time.perf_counter() - start)
        parts.metrics.read_bytes.inc(_size(block))
    return block


def _size(block: Block | None) -> int:
    """Its bytes."""
    if isinstance(block, list):
        return size(block)
    return 0 if block is None else len(block)
