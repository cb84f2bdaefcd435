"""Routes that give activations."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hiddenlake.cache.service import wire
from hiddenlake.cache.service.app import By, Parts, With, caller_of, need, parts_of, problems
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.read_request import ReadRequest
from hiddenlake.cache.service.reading import Block, Reading, plan_reading
from hiddenlake.cache.service.sending import Files, Streamed, Whole, sends_files
from hiddenlake.cache.store.extents import size

# What the names of so many take, in front of the values, keeps nobody waiting.
_FEW_SAMPLES = 4096

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


class CellQuery(BaseModel):
    """A query for one (layer, position)."""

    model_config = ConfigDict(frozen=True)

    site: str = Field(max_length=64, examples=["mlp_out"])
    layer: int | None = None
    position: str | None = Field(None, max_length=64, examples=["exact_answer_last"])
    dtype: Literal["stored", "float32"] = "stored"
    format: Literal["safetensors", "raw"] = "safetensors"
    check: bool = True


class _CellRoute(APIRoute):
    """Takes a query apart at once: parameter by parameter, as FastAPI does, this takes a third of a request's whole time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            for one in self.dependencies:
                await one.dependency(request)
            with _as_request_error("query"):
                cell = CellQuery.model_validate(dict(request.query_params))
            return await self.endpoint(request, request.path_params["name"], cell)

        return handle


@contextmanager
def _as_request_error(*place: str) -> Iterator[None]:
    """What is wrong with what was asked for, as FastAPI says it. place : in the request."""
    try:
        yield
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": (*place, *one["loc"])} for one in error.errors()]) from error


async def read_cell(request: Request, name: str, cell: Annotated[CellQuery, Query()]) -> Response:
    """The matrix of which probes are made, for a browser or curl. Without a layer or a position, all of them."""
    layers = None if cell.layer is None else (cell.layer,)
    positions = None if cell.position is None else (cell.position,)
    with _as_request_error():  # a name that is too long, say
        asked = ReadRequest(
            capture=name, site=cell.site, dtype=cell.dtype, format=cell.format, check=cell.check, layers=layers,
            positions=positions,
        )  # fmt: skip
    return await _answer(asked, await parts_of(request), await caller_of(request), await sends_files(request))


router.add_api_route(
    "/v1/captures/{name}/activations",
    read_cell,
    methods=["GET"],
    route_class_override=_CellRoute,
    summary="One (layer, position) of all samples",
    response_class=Response,
    responses=_CONTENT | problems(404, 409, 413, 500, 503),
)


async def _answer(request: ReadRequest, parts: Parts, caller: Caller, files: bool) -> Response:
    begun = None
    if files and not request.check and request.tokens is None and request.samples is None:
        # One after the other, with a round of the loop for each: else connections that wait for room wait for all of them.
        async with parts.turn:
            begun = _at_hand(request, parts, caller)
            await asyncio.sleep(0)
    if begun is None:
        begun = await run_sync(_begin, request, parts, caller, files, limiter=_limiter(_readers(parts)))
    reading, blocks, first = begun
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


def _at_hand(request: ReadRequest, parts: Parts, caller: Caller) -> tuple[Reading, Iterator[Block], Block] | None:
    """What the kernel has at hand and is only to be named, which takes half as long as to have a thread do it."""
    capture = parts.lake.at_hand(request.capture, caller)
    if capture is None or len(capture) > _FEW_SAMPLES or not parts.holdings.is_noted(request.capture):
        return None
    if request.format == "safetensors" and not capture.snapshot.has_cell_tokens:
        return None
    start = time.perf_counter()
    try:
        reading = plan_reading(capture, request, parts.settings.max_read)
    except Problem:  # perhaps not, once the capture is looked at again
        return None
    values = reading.at_hand()
    if values is None:
        return None
    _note(parts, start, values)
    return reading, iter(()), values


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
        _note(parts, start, block)
    return block


def _note(parts: Parts, start: float, block: Block) -> None:
    """start : seconds of `perf_counter` when its reading began."""
    parts.metrics.read_seconds.observe(time.perf_counter() - start)
    parts.metrics.read_bytes.inc(_size(block))


def _size(block: Block | None) -> int:
    """Its bytes."""
    if isinstance(block, list):
        return size(block)
    return 0 if block is None else len(block)
