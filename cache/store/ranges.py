"""Reading parts of committed files: whole chunks or single rows, checked, decoded, in parallel.

Chunks that lie in memory are copied by as many threads as there are cores; those that do not are asked for all at once
and read by more threads, so that a cold disk, or an object store, works on all of them together. Single rows are
gathered from mapped memory: a system call for each would take ten times as long as the copy.
"""

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.checksums import row_checksums
from hiddenlake.cache.store.codecs import decompress, values
from hiddenlake.cache.store.opened import OpenFile
from hiddenlake.cache.store.shard_file import ShardFile

Item = TypeVar("Item")

# Below this, waking a thread takes as long as it saves.
_THREADS_FROM_BYTES = 1 << 20

# Chunks that are not in memory before it is taken for granted that the others are not.
_COLD_CHUNKS = 16

# What a cold disk is told of ahead of what is read from it. Of more it would be told only as fast as it reads, and nothing
# would be copied meanwhile.
_AHEAD_BYTES = 64 << 20

# A row that takes longer than this came from a disk.
_COLD_SECONDS = 30e-6

# Rows that are gathered before it is asked how long that took: each may wait for the disk alone.
_PROBE_ROWS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of some chunks of one file, and where they go.

    places : (cell,) of the chunks in the file.  cells : (cell,) where each goes along the result's first axis.
    slots : (n,) rows of each of the chunks.  into : (n,) their places along the result's second axis.
    in_order : whether these are all rows of a chunk, one behind the other, in both.
    """

    places: np.ndarray
    cells: np.ndarray
    slots: np.ndarray
    into: np.ndarray
    in_order: bool


def in_order(slots: np.ndarray, into: np.ndarray, rows: int) -> bool:
    """See Part. rows : of a chunk."""
    return (
        len(slots) == rows
        and slots[0] == 0
        and bool((slots[1:] - slots[:-1] == 1).all() and (into[1:] - into[:-1] == 1).all())
    )


class _Chunk(NamedTuple):
    """A chunk that is read as a whole.

    place, cell : in the file, and in the result.  offset, length, crc : of its bytes in the file, as committed.
    straight : where its bytes go as they are, None where they do not.
    """

    file: OpenFile
    part: Part
    place: int
    cell: int
    offset: int
    length: int
    crc: int
    straight: np.ndarray | None


def _chunks(file: OpenFile, part: Part, straight: np.ndarray | None) -> Iterator[_Chunk]:
    """straight : (cell, byte) where bytes go as they are."""
    offsets, lengths, crcs = file.offsets, file.lengths, file.crcs
    for place, cell in zip(part.places.tolist(), part.cells.tolist(), strict=True):
        to = None if straight is None else straight[cell]
        yield _Chunk(file, part, place, cell, int(offsets[place]), int(lengths[place]), int(crcs[place]), to)


def read_parts(
    reads: Sequence[tuple[OpenFile, Sequence[Part]]], out: np.ndarray, wanted: str, check: bool, single: bool = False
) -> None:
    """Fill out from several files. Raises CorruptError.

    out : (cell, row, width) of `result_dtype`, rows contiguous.  wanted : `stored` or `float32`.
    single : whether rows are read by themselves wherever that can be done.
    """
    if not out.size:
        return
    chunks: list[_Chunk] = []
    rows: list[tuple[OpenFile, Part]] = []
    asked = 0
    flat = out.reshape(out.shape[0], -1).view(np.uint8)
    row_bytes = out.shape[-1] * out.itemsize
    for file, parts in reads:
        shape = file.committed.shape
        whole = not shape.fixed or (not single and (all(part.in_order for part in parts) or _whole(file, parts, check)))
        for part in parts:
            if not whole:
                rows.append((file, part))
            elif part.in_order and _as_is(shape, wanted):
                start = int(part.into[0]) * row_bytes
                chunks += _chunks(file, part, flat[:, start : start + shape.chunk_bytes])
            else:
                chunks += _chunks(file, part, None)
        # What was not open is rarely in memory: the disk works on it while the rest is made ready.
        if whole and file.new and asked < _AHEAD_BYTES:
            for part in parts:
                for place in part.places.tolist():
                    file.file.will_need(int(file.offsets[place]), int(file.lengths[place]))
                    asked += int(file.lengths[place])
        file.new = False
    if chunks:
        _read_chunks(chunks, out, wanted, check)
    if rows:
        _read_every_row(rows, out, wanted, check)


def _whole(file: OpenFile, parts: Sequence[Part], check: bool) -> bool:
    """Whether reading chunks as wholes takes no more bytes."""
    shape = file.committed.shape
    rows = sum(len(part.places) * len(part.slots) for part in parts) * shape.row_bytes
    if check and not file.has_row_checksums:
        rows += file.committed.commits[0].files[file.committed.row_crc].size
    return rows >= sum(len(part.places) for part in parts) * shape.chunk_bytes


def _as_is(shape: ShardFile, wanted: str) -> bool:
    """Whether a row's bytes in the file are those of the result."""
    return shape.codec == "none" and (wanted == "stored" or shape.dtype == "float32")


def _read_chunks(chunks: list[_Chunk], out: np.ndarray, wanted: str, check: bool) -> None:
    """Those in memory first; then the others, asked for before they are read."""
    waiting, cold = deque(chunks), deque()
    size = sum(chunk.length for chunk in chunks)

    def read_cached() -> None:
        scratch = _Scratch()
        for chunk in _taken(waiting):
            if not _read_chunk(chunk, out, wanted, check, scratch, wait=False):
                cold.append(chunk)
            if len(cold) >= _COLD_CHUNKS:
                return

    def read_cold() -> None:
        scratch = _Scratch()
        for chunk in _taken(waiting):
            announce(1)
            _read_chunk(chunk, out, wanted, check, scratch, wait=True)

    def announce(count: int) -> None:
        for chunk in itertools.islice(announced, count):
            chunk.file.file.will_need(chunk.offset, chunk.length)

    threads = min(len(chunks), os.cpu_count() or 1) if size >= _THREADS_FROM_BYTES else 1
    _together(read_cached, threads)
    if cold:
        waiting = deque(sorted([*cold, *waiting], key=lambda chunk: (id(chunk.file), chunk.place)))
        announced = iter(list(waiting))
        announce(max(1, len(waiting) * _AHEAD_BYTES // size))
        _together(read_cold, min(len(waiting), chunks[0].file.committed.place.parallel))


def _taken(waiting: deque[Item]) -> Iterator[Item]:
    """One after the other, each by one thread, until none is left."""
    while True:
        try:
            item = waiting.popleft()
        except IndexError:
            return
        yield item


def _together(work, threads: int) -> None:
    """Run it in several threads, this one among them."""
    others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        # One that has not begun has nothing left to do.
        errors = [other.exception() for other in others if not other.cancel()]
    for error in errors:
        if error is not None:
            raise error


@lru_cache(1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(64, "hiddenlake-read")


class _Scratch:
    """Memory of one thread for chunks that do not go straight into the result."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def take(self, kind: str, size: int) -> np.ndarray:
        """(size,) uint8."""
        if kind not in self._memory or self._memory[kind].nbytes < size:
            self._memory[kind] = np.empty(size, np.uint8)
        return self._memory[kind][:size]


def _read_chunk(chunk: _Chunk, out: np.ndarray, wanted: str, check: bool, scratch: _Scratch, wait: bool) -> bool:
    """Read, check, decode and place one chunk. Returns False where it would have had to be waited for."""
    file, offset = chunk.file, chunk.offset
    data = scratch.take("data", chunk.length) if chunk.straight is None else chunk.straight
    if wait:
        read_range(file, offset, data)
    elif not _read_cached(file, offset, data):
        return False
    if check and (found := crc32c(data)) != chunk.crc:
        raise CorruptError(
            f"{file.committed}: the chunk at byte {offset} ({chunk.length} bytes) has crc32c {found:#010x}, but "
            f"{chunk.crc:#010x} was committed: {file.committed.remedy}"
        )
    if chunk.straight is not None:
        return True
    rows, shape = data, file.committed.shape
    if not shape.fixed:
        rows = scratch.take("rows", shape.chunk_bytes)
        try:
            decompress(data, rows)
        except ValueError as error:
            raise CorruptError(
                f"{file.committed}: the chunk at byte {offset} cannot be decompressed ({error}): {file.committed.remedy}"
            ) from error
    rows = rows.view(shape.stored).reshape(shape.rows, shape.width)
    scale = None if file.scale is None else file.scale[chunk.place]
    _place(rows, scale, chunk.part, shape, wanted, out[chunk.cell])
    return True


def _place(
    rows: np.ndarray, scale: np.ndarray | None, part: Part, shape: ShardFile, wanted: str, out: np.ndarray
) -> None:
    """Decode the wanted rows of a chunk into their places. rows : (row, width) as stored.  out : (row, width)."""
    slots, into = part.slots, part.into
    if part.in_order:
        first = int(into[0])
        values(rows, scale, shape, wanted, out[first : first + shape.rows])
        return
    if _as_is(shape, wanted):
        out.view(shape.stored)[into] = rows[slots]
        return
    decoded = np.empty((len(slots), shape.width), out.dtype)
    values(rows[slots], None if scale is None else scale[slots], shape, wanted, decoded)
    out[into] = decoded


def read_range(file: OpenFile, offset: int, out: np.ndarray) -> None:
    """Bytes of a file, waited for. Raises CorruptError."""
    try:
        file.file.read(offset, out)
    except (OSError, EOFError) as error:
        raise _unreadable(file, offset, error) from error


def _read_cached(file: OpenFile, offset: int, out: np.ndarray) -> bool:
    try:
        return file.file.read_cached(offset, out)
    except OSError as error:
        raise _unreadable(file, offset, error) from error


def _unreadable(file: OpenFile, offset: int, error: Exception) -> CorruptError:
    what = getattr(error, "strerror", None) or str(error)
    return CorruptError(f"{file.committed}: {what} at byte {offset}: check the disk (dmesg); {file.committed.remedy}")


def _read_every_row(reads: list[tuple[OpenFile, Part]], out: np.ndarray, wanted: str, check: bool) -> None:
    """Single rows of several files. Once one of them comes from a disk, it is told of all others."""
    waiting, announced = deque(reads), False

    def work() -> None:
        nonlocal announced
        for file, part in _taken(waiting):
            if _read_rows(file, part, out, wanted, check, announced) and not announced:
                announced = True
                for others in list(waiting):
                    _announce(*others)

    # Mapped memory is copied by one thread: the interpreter would not let another one in between.
    mapped = reads[0][0].rows is not None
    _together(work, 1 if mapped else min(len(reads), reads[0][0].committed.place.parallel))


def _announce(file: OpenFile, part: Part) -> None:
    for offset, length in _ranges(file, part):
        file.file.will_need(offset, length)


def _read_rows(file: OpenFile, part: Part, out: np.ndarray, wanted: str, check: bool, announced: bool) -> bool:
    """Single rows, checked by their own checksums. Returns whether they came from a disk.

    announced : whether the disk was told of them.
    """
    shape = file.committed.shape
    if check and not announced and not file.has_row_checksums:
        _announce(file, part)  # so that it works on them while it is asked for their checksums
        announced = True
    expected = file.row_checksums if check else None
    places, slots, cells, into = map(_regular, (part.places, part.slots, part.cells, part.into))
    regular = all(isinstance(index, slice) for index in (places, slots, cells, into))
    placed = cold = False
    if file.rows is None:
        rows = _fetch(file, part)
    elif regular:
        # A view of the file, so that each byte is copied once.
        source = file.rows[places, slots]
        placed = _as_is(shape, wanted)
        rows = out.view(shape.stored)[cells, into] if placed else np.empty(source.shape, shape.stored)
        cold = _copy_rows(file, part, lambda some: source[some], rows, announced)
    else:
        rows = np.empty((len(part.places), len(part.slots), shape.width), shape.stored)
        cold = _copy_rows(file, part, lambda some: file.rows[part.places[some, None], part.slots], rows, announced)
    chosen = (places, slots) if regular else (part.places[:, None], part.slots)
    if expected is not None:
        expected = expected[chosen]
        found = row_checksums(rows).reshape(expected.shape)
        if (found != expected).any():
            cell, row = np.argwhere(found != expected)[0].tolist()
            offset = int(file.offsets[part.places[cell]]) + int(part.slots[row]) * shape.row_bytes
            raise CorruptError(
                f"{file.committed}: the row at byte {offset} ({shape.row_bytes} bytes) has crc32c "
                f"{int(found[cell, row]):#010x}, but {int(expected[cell, row]):#010x} was stored: {file.committed.remedy}"
            )
    if placed:
        return cold
    where = (cells, into) if regular else np.ix_(part.cells, part.into)
    if _as_is(shape, wanted):
        out.view(shape.stored)[where] = rows
        return cold
    decoded = np.empty(rows.shape, out.dtype)
    values(rows, None if file.scale is None else file.scale[chosen], shape, wanted, decoded)
    out[where] = decoded
    return cold


def _regular(index: np.ndarray) -> slice | np.ndarray:
    """An index as a slice, where it is one."""
    if len(index) == 1:
        return slice(int(index[0]), int(index[0]) + 1)
    steps = index[1:] - index[:-1]
    if len(index) and steps[0] > 0 and bool((steps == steps[0]).all()):
        return slice(int(index[0]), int(index[-1]) + 1, int(steps[0]))
    return index


def _copy_rows(
    file: OpenFile, part: Part, source: Callable[[slice], np.ndarray], out: np.ndarray, announced: bool
) -> bool:
    """Copy rows out of mapped memory. Returns whether the first of them came from a disk, which is then told of the
    others before they are waited for one by one.

    source : some of the cells -> their rows.  out : (cell, n, width) as stored.
    """
    first = len(out) if announced else max(1, _PROBE_ROWS // len(part.slots))
    start = time.perf_counter()
    out[:first] = source(slice(0, first))
    cold = time.perf_counter() - start > _COLD_SECONDS * first * len(part.slots)
    if len(out) > first:
        if cold:
            _announce(file, part)
        out[first:] = source(slice(first, None))
    return cold


def _ranges(file: OpenFile, part: Part) -> list[tuple[int, int]]:
    """(offset, bytes) of the wanted rows, neighbours together."""
    size = file.committed.shape.row_bytes
    distinct = np.unique(part.slots)
    starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
    counts = np.diff([*starts, len(distinct)])
    runs = list(zip(distinct[starts].tolist(), counts.tolist(), strict=True))
    offsets = file.offsets[part.places].tolist()
    return [(offset + slot * size, count * size) for offset in offsets for slot, count in runs]


def _fetch(file: OpenFile, part: Part) -> np.ndarray:
    """(cell, n, width) as stored, by positioned reads in parallel: where files cannot be mapped."""
    shape = file.committed.shape
    distinct, back = np.unique(part.slots, return_inverse=True)
    rows = np.empty((len(part.places), len(distinct), shape.width), shape.stored)
    data = rows.reshape(-1).view(np.uint8)
    ranges = _ranges(file, part)
    ends = np.cumsum([length for _, length in ranges]).tolist()
    waiting = deque(zip(ranges, ends, strict=True))

    def read() -> None:
        for (offset, length), end in _taken(waiting):
            read_range(file, offset, data[end - length : end])

    _together(read, min(len(ranges), file.committed.place.parallel))
    return rows[:, back]


def check_index(file: OpenFile) -> None:
    """The shard index, by which other readers find chunks, says what the commit means. Raises CorruptError."""
    shape = file.committed.shape
    expected = np.frombuffer(shape.index(file.lengths), np.uint8)
    found = np.empty(len(expected), np.uint8)
    offset = file.file.size - len(expected)
    read_range(file, offset, found)
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        at = int(wrong[0])
        raise CorruptError(
            f"{file.committed}: the shard index at byte {offset} differs from the layout's at byte {offset + at} "
            f"({found[at]:#04x}, expected {expected[at]:#04x}): {file.committed.remedy}"
        )


def cells_of(outer: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """(cell,) numbers of chunks, of every combination of indices along the axes before the rows, in C order."""
    numbers = np.zeros(1, np.int64)
    for axis, size in zip(outer, shape, strict=True):
        numbers = (numbers[:, None] * size + axis).ravel()
    return numbers if math.prod(shape) else numbers[:0]
