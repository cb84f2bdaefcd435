"""Positioned, checked reads of byte ranges of shard files, in parallel over files."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.commits import Commit, FileRecord, read_checked, remedy
from hiddenlake.cache.store.shard_file import ShardFile

# Several reads in flight hide a cold disk's latency, also on few cores.
_THREADS = min(16, 4 + (os.cpu_count() or 1))

# Below this, handing work to threads takes longer than the work: a warm cell of 1,000 samples is 1 to 10 MB.
_THREADS_FROM_BYTES = 16 << 20

# Shards whose files are open at once: far below the usual limit of 1,024 descriptors.
_OPEN_FILES = 128

# Row checksums and indexes that stay in memory: a third of a percent of the activations they stand for.
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of some chunks of one file, and where they go.

    cells : (place in the result, chunk number); the rows of a place have their own axis, the one before the last.
    slots : (n,) rows of each of the chunks.  into : (n,) their places along that axis.
    """

    cells: list[tuple[tuple[int, ...], int]]
    slots: np.ndarray
    into: np.ndarray


@dataclass(frozen=True, slots=True)
class FileRead:
    """What one read wants of one shard file.

    path : the capture.  name, row_crc : the file and its row checksums, inside the capture.
    shape : where its bytes lie.
    commits : who vouches for it, at least one.
    """

    path: Path
    name: str
    row_crc: str
    shape: ShardFile
    commits: tuple[Commit, ...]
    parts: list[Part]

    @property
    def file(self) -> Path:
        return self.path / self.name

    def record(self, name: str) -> FileRecord:
        return self.commits[0].files[name]

    @property
    def shards(self) -> list[int]:
        return [commit.shard for commit in self.commits]


def read_files(reads: Sequence[FileRead], out: np.ndarray, check: bool) -> None:
    """Fill out (..., row, width), bits, from several files. Raises CorruptError."""
    if not out.size:
        return
    for start in range(0, len(reads), _OPEN_FILES):
        with ExitStack() as stack:
            plans = [_plan(read, check, stack) for read in reads[start : start + _OPEN_FILES]]
            if len(plans) == 1 or out.nbytes < _THREADS_FROM_BYTES:
                for plan in plans:
                    plan.fill(out)
            else:
                for _ in _pool(os.getpid()).map(lambda plan: plan.fill(out), plans):
                    pass


@lru_cache(1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(_THREADS, "hiddenlake-read")


@dataclass(frozen=True, slots=True)
class _Plan:
    """One file's part of a read: an open file, whose ranges the kernel was told to fetch.

    whole : whether to read whole chunks, or single rows.
    """

    read: FileRead
    descriptor: int
    whole: bool
    check: bool

    def fill(self, out: np.ndarray) -> None:
        scratch = np.empty((self.read.shape.rows, self.read.shape.width), self.read.shape.bits)
        for part in self.read.parts:
            if self.whole:
                self._fill_from_chunks(out, part, scratch)
            else:
                self._fill_from_rows(out, part)

    def _fill_from_chunks(self, out: np.ndarray, part: Part, scratch: np.ndarray) -> None:
        """Whole chunks, checked by their own crc32c."""
        shape, read = self.read.shape, self.read
        # A chunk that lands in the result as it is, is read straight into it.
        straight = len(part.slots) == shape.rows and bool(
            (part.slots == np.arange(shape.rows)).all() and (np.diff(part.into) == 1).all()
        )
        checksum = np.empty(4, np.uint8)
        for place, chunk in part.cells:
            target = out[place][part.into[0] : part.into[0] + shape.rows] if straight else scratch
            data = target.reshape(-1).view(np.uint8)
            offset = shape.offset(chunk)
            _preadv(read, self.descriptor, [data, checksum], offset)
            found, stored = crc32c(data), int.from_bytes(checksum.tobytes(), "little")
            if found != stored:
                raise CorruptError(
                    f"{read.file}: the chunk at byte {offset} ({shape.chunk_bytes} bytes) has crc32c {found:#010x}, "
                    f"but {stored:#010x} was stored: {_remedy(read)}"
                )
            if not straight:
                out[place][part.into] = scratch[part.slots]

    def _fill_from_rows(self, out: np.ndarray, part: Part) -> None:
        """Single rows, checked by row_crc; runs of neighbours are read at once."""
        shape, read = self.read.shape, self.read
        distinct, back = np.unique(part.slots, return_inverse=True)
        starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
        runs = list(zip(starts.tolist(), [*starts[1:].tolist(), len(distinct)], distinct[starts].tolist(), strict=True))
        checksums = _row_checksums(read) if self.check else None
        scratch = np.empty((len(distinct), shape.width), shape.bits)
        for place, chunk in part.cells:
            offset = shape.offset(chunk)
            for start, stop, slot in runs:
                data = scratch[start:stop].reshape(-1).view(np.uint8)
                _preadv(read, self.descriptor, [data], offset + slot * shape.row_bytes)
            if checksums is not None:
                found = np.fromiter(map(crc32c, scratch), np.uint32, len(distinct))
                wrong = np.flatnonzero(found != checksums[chunk, distinct])
                if len(wrong):
                    slot = int(distinct[wrong[0]])
                    raise CorruptError(
                        f"{read.file}: the row at byte {offset + slot * shape.row_bytes} "
                        f"({shape.row_bytes} bytes) has crc32c {int(found[wrong[0]]):#010x}, but "
                        f"{int(checksums[chunk, slot]):#010x} was stored: {_remedy(read)}"
                    )
            out[place][part.into] = scratch[back]


def _plan(read: FileRead, check: bool, stack: ExitStack) -> _Plan:
    """Open a file, check what is checked once, choose between rows and chunks, start the read-ahead."""
    shape = read.shape
    descriptor = _open(read)
    stack.callback(os.close, descriptor)
    if check:
        _check_index(read, descriptor)
    rows = sum(len(part.cells) * len(np.unique(part.slots)) for part in read.parts)
    chunks = sum(len(part.cells) for part in read.parts)
    checksums_bytes = 0 if _cached(read) else read.record(read.row_crc).size
    whole = check and rows * shape.row_bytes + checksums_bytes >= chunks * shape.chunk_bytes
    for part in read.parts:
        first, last = (0, shape.rows - 1) if whole else (int(part.slots.min()), int(part.slots.max()))
        numbers = sorted({chunk for _, chunk in part.cells})
        _will_need(descriptor, shape, numbers, first * shape.row_bytes, (last + 1) * shape.row_bytes + 4)
    return _Plan(read, descriptor, whole, check)


def _open(read: FileRead) -> int:
    size = read.record(read.name).size
    try:
        descriptor = os.open(read.file, os.O_RDONLY)
    except OSError as error:
        raise CorruptError(
            f"{read.file}: {error.strerror}, but shard {read.shards[0]} was committed with it ({size} bytes): "
            f"{_remedy(read)}"
        ) from error
    found = os.fstat(descriptor).st_size
    if found != size or found != read.shape.size:
        os.close(descriptor)
        raise CorruptError(
            f"{read.file}: {found} bytes, but {size} were committed (it ends at byte {found}): {_remedy(read)}"
        )
    return descriptor


def _preadv(read: FileRead, descriptor: int, buffers: list[np.ndarray], offset: int) -> None:
    wanted = sum(buffer.nbytes for buffer in buffers)
    try:
        got = os.preadv(descriptor, buffers, offset)
        while 0 < got < wanted:
            # A signal, or a range above the kernel's 2 GiB, ends a read early.
            rest, skip = [], got
            for buffer in buffers:
                rest.append(buffer[min(skip, buffer.nbytes) :])
                skip -= min(skip, buffer.nbytes)
            more = os.preadv(descriptor, rest, offset + got)
            if more == 0:
                break
            got += more
    except OSError as error:
        raise CorruptError(
            f"{read.file}: {error.strerror} at byte {offset}: check the disk (dmesg); {_remedy(read)}"
        ) from error
    if got < wanted:
        raise CorruptError(
            f"{read.file}: it ends at byte {offset + got}, but {wanted} bytes from {offset} were committed: "
            f"{_remedy(read)}"
        )


def _will_need(descriptor: int, shape: ShardFile, chunks: list[int], start: int, stop: int) -> None:
    """Tell the kernel what will be read, so that a cold disk works on all ranges of all shards together.

    start, stop : the wanted bytes inside each of the chunks.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    length = shape.offset(chunks[-1]) - shape.offset(chunks[0]) + stop - start
    if length <= len(chunks) * shape.pitch and stop - start > shape.pitch // 2:
        os.posix_fadvise(descriptor, shape.offset(chunks[0]) + start, length, os.POSIX_FADV_WILLNEED)
        return
    for chunk in chunks:
        os.posix_fadvise(descriptor, shape.offset(chunk) + start, stop - start, os.POSIX_FADV_WILLNEED)


_cache: OrderedDict[tuple, np.ndarray] = OrderedDict()
_cache_lock = threading.Lock()


def _cache_key(read: FileRead, kind: str) -> tuple:
    """A shard that is captured again has another commit, so the file's checksum there tells the two apart."""
    commit = read.commits[0]
    return str(read.path), read.name, commit.writer, commit.fencing, commit.files[read.name].crc32c, kind


def _cached(read: FileRead) -> bool:
    return _cache_key(read, "rows") in _cache


def _remember(key: tuple, value: np.ndarray) -> None:
    with _cache_lock:
        _cache[key] = value
        while sum(entry.nbytes for entry in _cache.values()) > _CACHE_BYTES and len(_cache) > 1:
            _cache.popitem(last=False)


def _row_checksums(read: FileRead) -> np.ndarray:
    """crc32c of each row, (chunk, row) uint32, itself checked."""
    key = _cache_key(read, "rows")
    found = _cache.get(key)
    if found is None:
        raw = read_checked(read.path, read.row_crc, read.record(read.row_crc), read.shards)
        chunks = math.prod(read.shape.outer)
        found = np.frombuffer(raw, "<u4", chunks * read.shape.rows).reshape(chunks, read.shape.rows)
        _remember(key, found)
    return found


def _check_index(read: FileRead, descriptor: int) -> None:
    """The shard's index says where its layout puts the chunks. Checked once a shard."""
    key = _cache_key(read, "index")
    if key in _cache:
        return
    shape = read.shape
    found = np.empty(len(shape.index), np.uint8)
    _preadv(read, descriptor, [found], shape.index_offset)
    wrong = np.flatnonzero(found != np.frombuffer(shape.index, np.uint8))
    if len(wrong):
        raise CorruptError(
            f"{read.file}: the shard index at byte {shape.index_offset} differs from the layout's at byte "
            f"{shape.index_offset + int(wrong[0])} ({found[wrong[0]]:#04x}, expected {shape.index[wrong[0]]:#04x}): "
            f"{_remedy(read)}"
        )
    _remember(key, np.empty(1, np.uint8))


def _remedy(read: FileRead) -> str:
    return remedy(read.path, read.shards)
