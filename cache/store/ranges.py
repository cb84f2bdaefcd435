"""Positioned, checked reads of byte ranges of shard files, in parallel over shards."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.commits import Commit, read_checked, remedy
from hiddenlake.cache.store.files import crc32c
from hiddenlake.cache.store.layout import Layout, ShardFile

# Several reads in flight hide a cold disk's latency, also on few cores.
_THREADS = min(16, 4 + (os.cpu_count() or 1))

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
    if len(reads) == 1:
        _read_shard(reads[0], outer, out, check)
        return
    for _ in _pool(os.getpid()).map(lambda read: _read_shard(read, outer, out, check), reads):
        pass


@lru_cache(1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(_THREADS, "hiddenlake-read")


def _read_shard(read: ShardRead, outer: Sequence[Sequence[int]], out: np.ndarray, check: bool) -> None:
    shape = read.shape
    descriptor = _open(read)
    try:
        if check:
            _check_index(read, descriptor)
        cells = [
            (place, int(np.ravel_multi_index(cell, shape.outer)))
            for place, cell in zip(np.ndindex(*(len(axis) for axis in outer)), product(*outer), strict=True)
        ]
        order = np.argsort(read.slots, kind="stable")
        slots, into = read.slots[order], read.into[order]
        rows_bytes = len(cells) * len(slots) * shape.row_bytes
        whole_bytes = len(cells) * shape.chunk_bytes
        checksums_bytes = read.commit.files[read.layout.row_crc_file(read.site, read.commit.shard)].size
        if check and rows_bytes + (0 if _cached(read) else checksums_bytes) >= whole_bytes:
            _read_chunks(read, descriptor, cells, slots, into, out)
        else:
            _read_rows(read, descriptor, cells, slots, into, out, check)
    finally:
        os.close(descriptor)


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


def _read_chunks(
    read: ShardRead,
    descriptor: int,
    cells: list[tuple[tuple[int, ...], int]],
    slots: np.ndarray,
    into: np.ndarray,
    out: np.ndarray,
) -> None:
    """Whole chunks, checked by their own crc32c."""
    shape = read.shape
    length = shape.chunk_bytes
    _will_need(descriptor, ((chunk * shape.pitch, length + 4) for _, chunk in cells))
    # A chunk that lands in the result as it is, is read straight into it.
    straight = len(slots) == shape.samples and bool(
        (slots == np.arange(shape.samples)).all() and (np.diff(into) == 1).all()
    )
    scratch = None if straight else np.empty((shape.samples, shape.width), shape.bits)
    checksum = np.empty(4, np.uint8)
    for place, chunk in cells:
        target = out[place][into[0] : into[0] + shape.samples] if straight else scratch
        data = target.reshape(-1).view(np.uint8)
        offset = chunk * shape.pitch
        _preadv(read, descriptor, [data, checksum], offset)
        found, stored = crc32c(data), int.from_bytes(checksum.tobytes(), "little")
        if found != stored:
            raise CorruptError(
                f"{read.file}: the chunk at byte {offset} ({length} bytes) has crc32c {found:#010x}, but {stored:#010x} "
                f"was stored: {_remedy(read)}"
            )
        if not straight:
            out[place][into] = scratch[slots]


def _read_rows(
    read: ShardRead,
    descriptor: int,
    cells: list[tuple[tuple[int, ...], int]],
    slots: np.ndarray,
    into: np.ndarray,
    out: np.ndarray,
    check: bool,
) -> None:
    """Single rows, checked by row_crc; runs of neighbours are read at once."""
    shape = read.shape
    distinct, back = np.unique(slots, return_inverse=True)
    starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
    stops = np.append(starts[1:], len(distinct))
    runs = [(int(a), int(b), int(distinct[a]) * shape.row_bytes) for a, b in zip(starts, stops, strict=True)]
    _will_need(
        descriptor,
        (
            (chunk * shape.pitch + offset, (stop - start) * shape.row_bytes)
            for _, chunk in cells
            for start, stop, offset in runs
        ),
    )
    checksums = _row_checksums(read) if check else None
    scratch = np.empty((len(distinct), shape.width), shape.bits)
    row = np.dtype((np.void, shape.row_bytes))
    for place, chunk in cells:
        for start, stop, offset in runs:
            _preadv(read, descriptor, [scratch[start:stop].reshape(-1).view(np.uint8)], chunk * shape.pitch + offset)
        if checksums is not None:
            found = np.fromiter(map(google_crc32c.value, scratch.view(row).ravel().tolist()), np.uint32, len(distinct))
            wrong = np.flatnonzero(found != checksums[chunk, distinct])
            if len(wrong):
                slot = int(distinct[wrong[0]])
                raise CorruptError(
                    f"{read.file}: the row at byte {chunk * shape.pitch + slot * shape.row_bytes} ({shape.row_bytes} "
                    f"bytes) has crc32c {int(found[wrong[0]]):#010x}, but {int(checksums[chunk, slot]):#010x} was "
                    f"stored: {_remedy(read)}"
                )
        out[place][into] = scratch[back]


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
            f"{read.file}: it ends at byte {offset + got}, but {wanted} bytes from {offset} were committed: {_remedy(read)}"
        )


def _will_need(descriptor: int, ranges: Iterator[tuple[int, int]]) -> None:
    """Tell the kernel all ranges before the first is read, so that a cold disk works on them together."""
    if hasattr(os, "posix_fadvise"):
        for offset, length in ranges:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


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
