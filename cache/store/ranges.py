"""Positioned, checked reads of byte ranges of shard files, in parallel over shards."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.commits import Commit, read_checked, remedy
from hiddenlake.cache.store.files import crc32c
from hiddenlake.cache.store.layout import Layout, ShardFile

# Several reads in flight hide a cold disk's latency, also on few cores.
_THREADS = min(16, 4 + (os.cpu_count() or 1))

# Below this, handing work to threads takes longer than the work: a warm cell of 1,000 samples is 1 to 10 MB.
_THREADS_FROM_BYTES = 16 << 20

# Shards whose files are open at once: far below the usual limit of 1,024 descriptors.
_OPEN_FILES = 128

# Row checksums and indexes that stay in memory: a third of a percent of the activations they stand for.
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ShardRead:
    """What one read wants of one shard.

    slots : (n,) slots in the shard.  into : (n,) places along the result's sample axis.
    """

    path: Path
    layout: Layout
    commit: Commit
    site: str
    slots: np.ndarray
    into: np.ndarray

    @property
    def shape(self) -> ShardFile:
        return self.layout.files[self.site]

    @property
    def file(self) -> Path:
        return self.path / self.layout.data_file(self.site, self.commit.shard)


def read_shards(reads: Sequence[ShardRead], outer: Sequence[Sequence[int]], out: np.ndarray, check: bool) -> None:
    """Fill out (*outer, sample, width), bits, from several shards. Raises CorruptError."""
    if not out.size:
        return
    for start in range(0, len(reads), _OPEN_FILES):
        with ExitStack() as stack:
            plans = [_plan(read, outer, check, stack) for read in reads[start : start + _OPEN_FILES]]
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
    """One shard's part of a read: an open file, whose ranges the kernel was told to fetch.

    cells : (place in the result, chunk number).  slots, into : as in ShardRead, by slot.
    runs : (first, last + 1, first slot) of neighbours among the distinct slots, or None to read whole chunks.
    """

    read: ShardRead
    descriptor: int
    cells: list[tuple[tuple[int, ...], int]]
    slots: np.ndarray
    into: np.ndarray
    runs: list[tuple[int, int, int]] | None
    check: bool

    def fill(self, out: np.ndarray) -> None:
        if self.runs is None:
            self._fill_from_chunks(out)
        else:
            self._fill_from_rows(out)

    def _fill_from_chunks(self, out: np.ndarray) -> None:
        """Whole chunks, checked by their own crc32c."""
        shape, read = self.read.shape, self.read
        # A chunk that lands in the result as it is, is read straight into it.
        straight = len(self.slots) == shape.samples and bool(
            (self.slots == np.arange(shape.samples)).all() and (np.diff(self.into) == 1).all()
        )
        scratch = None if straight else np.empty((shape.samples, shape.width), shape.bits)
        checksum = np.empty(4, np.uint8)
        for place, chunk in self.cells:
            target = out[place][self.into[0] : self.into[0] + shape.samples] if straight else scratch
            data = target.reshape(-1).view(np.uint8)
            offset = chunk * shape.pitch
            _preadv(read, self.descriptor, [data, checksum], offset)
            found, stored = crc32c(data), int.from_bytes(checksum.tobytes(), "little")
            if found != stored:
                raise CorruptError(
                    f"{read.file}: the chunk at byte {offset} ({shape.chunk_bytes} bytes) has crc32c {found:#010x}, "
                    f"but {stored:#010x} was stored: {_remedy(read)}"
                )
            if not straight:
                out[place][self.into] = scratch[self.slots]

    def _fill_from_rows(self, out: np.ndarray) -> None:
        """Single rows, checked by row_crc; runs of neighbours are read at once."""
        shape, read = self.read.shape, self.read
        distinct, back = np.unique(self.slots, return_inverse=True)
        checksums = _row_checksums(read) if self.check else None
        scratch = np.empty((len(distinct), shape.width), shape.bits)
        row = np.dtype((np.void, shape.row_bytes))
        for place, chunk in self.cells:
            for start, stop, slot in self.runs:
                data = scratch[start:stop].reshape(-1).view(np.uint8)
                _preadv(read, self.descriptor, [data], chunk * shape.pitch + slot * shape.row_bytes)
            if checksums is not None:
                rows = scratch.view(row).ravel().tolist()
                found = np.fromiter(map(google_crc32c.value, rows), np.uint32, len(distinct))
                wrong = np.flatnonzero(found != checksums[chunk, distinct])
                if len(wrong):
                    slot = int(distinct[wrong[0]])
                    raise CorruptError(
                        f"{read.file}: the row at byte {chunk * shape.pitch + slot * shape.row_bytes} "
                        f"({shape.row_bytes} bytes) has crc32c {int(found[wrong[0]]):#010x}, but "
                        f"{int(checksums[chunk, slot]):#010x} was stored: {_remedy(read)}"
                    )
            out[place][self.into] = scratch[back]


def _plan(read: ShardRead, outer: Sequence[Sequence[int]], check: bool, stack: ExitStack) -> _Plan:
    """Open a shard's file, check what is checked once, choose between rows and chunks, start the read-ahead."""
    shape = read.shape
    descriptor = _open(read)
    stack.callback(os.close, descriptor)
    if check:
        _check_index(read, descriptor)
    places = np.ndindex(*(len(axis) for axis in outer))
    numbers = np.ravel_multi_index(np.meshgrid(*outer, indexing="ij"), shape.outer).ravel().tolist()
    cells = list(zip(places, numbers, strict=True))
    order = np.argsort(read.slots, kind="stable")
    slots, into = read.slots[order], read.into[order]
    distinct = np.unique(slots)
    rows_bytes = len(cells) * len(distinct) * shape.row_bytes
    checksums_bytes = read.commit.files[read.layout.row_crc_file(read.site, read.commit.shard)].size
    runs = None
    if not check or rows_bytes + (0 if _cached(read) else checksums_bytes) < len(cells) * shape.chunk_bytes:
        starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
        stops = np.append(starts[1:], len(distinct))
        runs = [(int(a), int(b), int(distinct[a])) for a, b in zip(starts, stops, strict=True)]
    first, last = (0, shape.samples - 1) if runs is None else (int(distinct[0]), int(distinct[-1]))
    _will_need(descriptor, shape, sorted(set(numbers)), first * shape.row_bytes, (last + 1) * shape.row_bytes + 4)
    return _Plan(read, descriptor, cells, slots, into, runs, check)


def _open(read: ShardRead) -> int:
    size = read.commit.files[read.layout.data_file(read.site, read.commit.shard)].size
    try:
        descriptor = os.open(read.file, os.O_RDONLY)
    except OSError as error:
        raise CorruptError(
            f"{read.file}: {error.strerror}, but shard {read.commit.shard} was committed with it ({size} bytes): "
            f"{_remedy(read)}"
        ) from error
    found = os.fstat(descriptor).st_size
    if found != size or found != read.shape.size:
        os.close(descriptor)
        raise CorruptError(
            f"{read.file}: {found} bytes, but {size} were committed (it ends at byte {found}): {_remedy(read)}"
        )
    return descriptor


def _preadv(read: ShardRead, descriptor: int, buffers: list[np.ndarray], offset: int) -> None:
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
    if chunks[-1] - chunks[0] == len(chunks) - 1 and stop - start > shape.pitch // 2:
        length = (len(chunks) - 1) * shape.pitch + stop - start
        os.posix_fadvise(descriptor, chunks[0] * shape.pitch + start, length, os.POSIX_FADV_WILLNEED)
        return
    for chunk in chunks:
        os.posix_fadvise(descriptor, chunk * shape.pitch + start, stop - start, os.POSIX_FADV_WILLNEED)


_cache: OrderedDict[tuple, np.ndarray] = OrderedDict()
_cache_lock = threading.Lock()


def _cache_key(read: ShardRead, kind: str) -> tuple:
    """A shard that is captured again has another commit, so the commit's checksum tells the two apart."""
    record = read.commit.files[read.layout.data_file(read.site, read.commit.shard)]
    return str(read.path), read.site, read.commit.shard, read.commit.writer, read.commit.fencing, record.crc32c, kind


def _cached(read: ShardRead) -> bool:
    return _cache_key(read, "rows") in _cache


def _remember(key: tuple, value: np.ndarray) -> None:
    with _cache_lock:
        _cache[key] = value
        while sum(entry.nbytes for entry in _cache.values()) > _CACHE_BYTES and len(_cache) > 1:
            _cache.popitem(last=False)


def _row_checksums(read: ShardRead) -> np.ndarray:
    """crc32c of each row, (chunk, slot) uint32, itself checked."""
    key = _cache_key(read, "rows")
    found = _cache.get(key)
    if found is None:
        name = read.layout.row_crc_file(read.site, read.commit.shard)
        raw = read_checked(read.path, read.commit, name)
        shape = read.shape
        found = np.frombuffer(raw, "<u4", shape.chunks * shape.samples).reshape(shape.chunks, shape.samples)
        _remember(key, found)
    return found


def _check_index(read: ShardRead, descriptor: int) -> None:
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


def _remedy(read: ShardRead) -> str:
    return remedy(read.path, read.commit.shard)
