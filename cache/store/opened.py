"""Opened files: committed activation files and what their commits say of their bytes, kept open between reads."""

import os
import resource
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.backend import Backend, File
from hiddenlake.cache.store.commits import ChunkRecord, Commit, read_array, remedy
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ShardFile

# Row checksums and scales that stay in memory: a third of a percent of the activations that they stand for.
_CACHE_BYTES = 64 << 20


# zstd writes at most a block of 128 KiB for each four bytes: a header and the value that is repeated (RFC 8878, 3.1.1.2).
_MOST_DENSE = 1 << 15


@dataclass(frozen=True)
class Committed:
    """One activation file that commits vouch for.

    place : the capture.  name, row_crc, scale : the file, its rows' checksums and their scales, inside the capture.
    shape : where its bytes lie.  commits : who vouches for it, at least one.
    """

    place: Backend
    name: str
    row_crc: str
    scale: str
    shape: ShardFile
    commits: tuple[Commit, ...]

    def __str__(self) -> str:
        return f"{self.place}/{self.name}"

    @property
    def record(self) -> ChunkRecord:
        return self.commits[0].files[self.name]

    @property
    def shards(self) -> list[int]:
        return [commit.shard for commit in self.commits]

    @property
    def remedy(self) -> str:
        return remedy(self.place, self.shards)

    @cached_property
    def key(self) -> tuple:
        """A shard that is captured again has another commit, and its checksums tell the two apart."""
        commit = self.commits[0]
        return str(self.place), self.name, commit.writer, commit.fencing, self.record.crcs


def cell_file(place: Backend, layout: Layout, site: str, commit: Commit) -> Committed:
    """A site's file in a sample shard."""
    return Committed(place, *layout.cell_names(site, commit.shard), layout.files[site], (commit,))


def token_file(place: Backend, layout: Layout, site: str, shard: int, commits: tuple[Commit, ...]) -> Committed:
    """A site's file in a token shard. commits : those that vouch for it; the first says what is in it."""
    shape = replace(layout.token_files[site], columns=commits[0].token_shards[shard])
    return Committed(place, *layout.token_names(site, shard), shape, commits)


class OpenFile:
    """A committed file, open. It stays what it is when its name is removed or used again.

    offsets, lengths : (place,) where each chunk that is in the file starts, and its bytes without the checksum.
    crcs : (place,) crc32c of each as it is stored, from the commit.
    new : whether nothing was read since it was opened.
    """

    new = True

    def __init__(self, committed: Committed) -> None:
        self.committed = committed
        shape, record = committed.shape, committed.record
        self.lengths = shape.lengths(record)
        self.crcs = np.frombuffer(record.crcs, "<u4")
        if not len(self.lengths) == len(self.crcs) == len(shape.present):
            raise CorruptError(
                f"{committed}: its commit lists {len(self.crcs)} chunks, but the layout has {len(shape.present)}: "
                f"{committed.remedy}"
            )
        if not shape.fixed and (shape.chunk_bytes > _MOST_DENSE * (self.lengths + 1)).any():
            raise CorruptError(
                f"{committed}: its commit lists a chunk of {int(self.lengths.min())} bytes, which cannot hold "
                f"{shape.chunk_bytes} compressed ones: {committed.remedy}"
            )
        ends = shape.offsets(self.lengths)
        self.offsets = ends[:-1]
        expected = int(ends[-1]) + shape.index_bytes
        try:
            self.file: File = committed.place.open(committed.name)
        except OSError as error:
            raise CorruptError(
                f"{committed}: {error.strerror}, but shard {committed.shards[0]} was committed with it "
                f"({record.size} bytes): {committed.remedy}"
            ) from error
        if not self.file.size == record.size == expected:
            raise CorruptError(
                f"{committed}: {self.file.size} bytes, but {record.size} were committed (it ends at byte "
                f"{self.file.size}): {committed.remedy}"
            )

    @cached_property
    def rows(self) -> np.ndarray | None:
        """(place, row, width) as stored, mapped: fetched where it is touched. None where that cannot be done."""
        shape = self.committed.shape
        memory = self.file.mapped() if shape.fixed else None
        if memory is None:
            return None
        strides = (shape.pitch, shape.row_bytes, shape.stored.itemsize)
        return np.ndarray((len(self.lengths), shape.rows, shape.width), shape.stored, memory, 0, strides)

    @property
    def has_row_checksums(self) -> bool:
        return (*self.committed.key, "row_crc") in _arrays

    @property
    def row_checksums(self) -> np.ndarray:
        """(place, row) crc32c of each row, uint32, itself checked."""
        return self._array("row_crc", self.committed.row_crc, "<u4")

    @property
    def scale(self) -> np.ndarray | None:
        """(place, row) float32, checked; None where there is none."""
        return self._array("scale", self.committed.scale, "<f4") if self.committed.shape.codec == "fp8" else None

    def _array(self, kind: str, name: str, dtype: str) -> np.ndarray:
        key = (*self.committed.key, kind)
        found = _arrays.get(key)
        if found is None:
            found = self.load(name, dtype)
            with _lock:
                _arrays[key] = found
                while sum(entry.nbytes for entry in _arrays.values()) > _CACHE_BYTES and len(_arrays) > 1:
                    _arrays.popitem(last=False)
        return found

    def load(self, name: str, dtype: str) -> np.ndarray:
        """(place, row) numbers of the file of row checksums, or of scales, as it lies there now. Raises CorruptError."""
        one, shape = self.committed, self.committed.shape
        record, size = one.commits[0].files[name], len(shape.place) * shape.rows * np.dtype(dtype).itemsize + 4
        if record.size != size:
            raise CorruptError(
                f"{one.place}/{name}: {record.size} bytes were committed, but the layout has {size}: {one.remedy}"
            )
        every = read_array(one.place, name, record, one.shards, dtype)
        return every.reshape(len(shape.place), shape.rows)[shape.present]


def most_open() -> int:
    """How many files may stay open: each takes one descriptor, and a second one once it is mapped."""
    return max(32, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def find_open(committed: Committed) -> OpenFile | None:
    """A file that is open, without a look at the disk."""
    key = committed.key
    with _lock:
        found = _files.get(key)
        if found is not None:
            _files.move_to_end(key)
    return found


def open_committed(committed: Committed) -> OpenFile:
    """Open a file, or find it open. Raises CorruptError where it is missing or has another size."""
    found = find_open(committed)
    if found is not None:
        return found
    key, found = committed.key, OpenFile(committed)
    with _lock:
        # The last reference closes it, which may be a read that is going on.
        found = _files.setdefault(key, found)
        while len(_files) > most_open():
            _files.popitem(last=False)
    return found


def check_size(committed: Committed) -> None:
    """Raise CorruptError unless a file is there and as large as its commit says."""
    try:
        found = committed.place.size(committed.name)
    except OSError as error:
        raise CorruptError(f"{committed}: {error.strerror}: {committed.remedy}") from error
    if found != committed.record.size:
        raise CorruptError(
            f"{committed}: {found} bytes, but {committed.record.size} were committed: {committed.remedy}"
        )


def close_all(place: Backend) -> None:
    """Let go of a capture's files, and of what is remembered of them."""
    with _lock:
        for known in (_files, _arrays):
            for key in [key for key in known if key[0] == str(place)]:
                del known[key]


def _new_lock() -> None:
    """In a forked child: another thread of its parent may have held it. Descriptors are as good there."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)
_lock = threading.Lock()
_files: OrderedDict[tuple, OpenFile] = OrderedDict()
_arrays: OrderedDict[tuple, np.ndarray] = OrderedDict()
