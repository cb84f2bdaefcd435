"""Raw Zarr over HTTP: the files of what was committed, with Range and ETag, so that any Zarr reader opens a capture."""

import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.service.app import By, With, need, problems
from hiddenlake.cache.service.problems import Problem, no_such
from hiddenlake.cache.service.sending import Files, Streamed
from hiddenlake.cache.store.backend import File
from hiddenlake.cache.store.commits import Record
from hiddenlake.cache.store.extents import Extent, in_memory
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.snapshot import Snapshot

router = APIRouter(tags=["zarr"], dependencies=[need("read")])

# Handed to the connection at once.
_PART_BYTES = 1 << 20

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

# Snapshots whose files' names are remembered.
_HELD = 8


_CONTENT: dict[str, Any] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    "application/json": {"schema": {}},
}
# Of a route that gives a file.
FILE: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": _CONTENT},
        206: {"description": "The range that was asked for.", "content": _CONTENT},
        304: {"description": "It is what `If-None-Match` names."},
    }
    | problems(404, 416, 500, 503),
}
_PATH, _SUMMARY = "/v1/zarr/{name}/{path:path}", "A file of a capture's Zarr group"


@router.head(_PATH, summary=_SUMMARY, **FILE)
@router.get(_PATH, summary=_SUMMARY, **FILE)
def get_file(name: str, path: str, request: Request, parts: With, caller: By, files: Files) -> Response:
    """`xarray.open_zarr("http://HOST/v1/zarr/NAME", consolidated=True)`. Samples that are not committed are holes (NaN).

    Checked by Zarr's own crc32c codec, in the reader: as a file leaves here, nobody has looked at its bytes.
    """
    snapshot = parts.lake.capture(name, caller).snapshot
    known = _files(snapshot)
    if path not in known:
        raise no_such("file", "zarr.json names the arrays; a chunk that is not there is a hole")
    try:
        return _respond(snapshot, path, known[path], request, files)
    except OSError as error:
        raise trouble(f"{name}/{path}", error) from error


def _respond(snapshot: Snapshot, path: str, record: Record | None, request: Request, files: bool) -> Response:
    if record is None:
        return respond(request, path, _read(snapshot, path))
    size = record.size
    status, start, stop, headers = _asked(request, f'"{_digest(record)}"', size)
    media = _media(path)
    if status == 304:
        return Response(status_code=304, headers=headers)
    file = _open(snapshot, path, size)
    if request.method == "HEAD":
        file.close()
        return Response(b"", status, headers, media)
    return Streamed(_parts(file, start, stop, files), status, headers, media)


def respond(request: Request, path: str, raw: bytes) -> Response:
    """The answer to a request for a small file, which may be rewritten: what is sent is what was hashed. Raises Problem (416)."""
    status, start, stop, headers = _asked(request, f'"{sha256(raw).hexdigest()[:32]}"', len(raw))
    if status == 304:
        return Response(status_code=304, headers=headers)
    return Response(b"" if request.method == "HEAD" else raw[start:stop], status, headers, _media(path))


def _media(path: str) -> str:
    return "application/json" if path.endswith("zarr.json") else "application/octet-stream"


def _asked(request: Request, etag: str, size: int) -> tuple[int, int, int, dict[str, str]]:
    """(status, first byte, the one behind the last, headers). Raises Problem (416)."""
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "no-cache", "ETag": etag}
    named = request.headers.get("if-none-match", "")
    if etag in named or named.strip() == "*":
        return 304, 0, 0, headers
    start, stop = 0, size
    status = 200
    # A range of what has changed since would be put together with another file's: then all of it is sent.
    wanted = request.headers.get("range") if request.method == "GET" else None
    if wanted and request.headers.get("if-range", etag) == etag:
        if (found := _range(wanted, size)) is not None:
            start, stop = found
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    return status, start, stop, headers


def _read(snapshot: Snapshot, path: str) -> bytes:
    """A file that repeats what was committed. Raises Problem (404) where it was not made yet, OSError, StoreError."""
    try:
        raw = snapshot.place.read(path)
    except FileNotFoundError as error:
        snapshot.check_there()
        raise no_such("file", "ask again: it is made a moment after its samples are committed") from error
    snapshot.check_there()  # afterwards: what lies in its place by now is another capture's
    return raw


def _open(snapshot: Snapshot, path: str, size: int) -> File:
    """A committed file. Raises CorruptError where it is gone or has another size, StoreError."""
    try:
        file = snapshot.place.open(path)
    except FileNotFoundError as error:
        snapshot.check_there()
        raise CorruptError(f"{snapshot.place}/{path} is not there, but {size} bytes were committed") from error
    try:
        snapshot.check_there()
        if file.size != size:
            raise CorruptError(f"{snapshot.place}/{path} has {file.size} bytes, but {size} were committed")
    except BaseException:
        file.close()
        raise
    return file


def _parts(file: File, start: int, stop: int, files: bool) -> Iterator[memoryview | list[Extent]]:
    """Bytes of a file, which is closed then. Those in memory are only named if `files`."""
    files = files and file.fileno() is not None
    try:
        for at in range(start, stop, _PART_BYTES):
            extent = Extent(file, at, min(_PART_BYTES, stop - at))
            if files and in_memory([extent]):
                yield [extent]
                continue
            part = np.empty(extent.length, np.uint8)
            file.read(at, part)
            yield memoryview(part)
    finally:
        file.close()


def _range(header: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of one range; None for what may be answered with the whole file. Raises Problem (416)."""
    found = _RANGE.fullmatch(header.strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first and last and int(first) > int(last):
        return None
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
    if start >= stop:
        raise Problem(
            416, "range", f"no such bytes: the file has {size}", "ask for a range inside it",
            headers={"Content-Range": f"bytes */{size}"},
        )  # fmt: skip
    return start, stop


@lru_cache(maxsize=_HELD)
def _files(snapshot: Snapshot) -> dict[str, Record | None]:
    """Every file that may be asked for: what was committed, and what repeats it for readers that know Zarr only.

    Whatever else lies in the folder, and whatever a path may be made to say, is not here. samples/ are not arrays.
    """
    layout = snapshot.layout
    found: dict[str, Record | None] = dict.fromkeys([*snapshot.root.files(), *layout.coordinates()])
    for commit in snapshot.commits.values():
        if commit.files:
            found |= dict.fromkeys(layout.derived_files(commit.shard).values())
            found |= {name: record for name, record in commit.files.items() if not name.startswith("samples/")}
    return found


@lru_cache(maxsize=4096)
def _digest(record: Any) -> str:
    return sha256(repr(record).encode()).hexdigest()[:32]
