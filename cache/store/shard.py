"""Shard buffers: the files of one shard, in memory, filled row by row by whoever has the rows.

A sample shard's buffer is the file's image; a token shard's rows lie one behind another, so that a sample's tokens
are one slice, and the file is the chunks of it with their checksums between them. Publishing either is one
sequential write: no copy, no transpose.
"""

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CaptureError, StoreError
from hiddenlake.cache.store.checksums import checked_pieces, row_checksums
from hiddenlake.cache.store.codecs import Encoding
from hiddenlake.cache.store.coverage import DTYPES, INFINITY
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ShardFile

# Mappings of other processes' buffers that a process keeps: four buffers x a few sites x a few writers.
_MAPPINGS = 128

# A row that is not written yet is marked in at least so many places. Whoever writes only a part of it, as one of up to
# so many ranks of tensor parallelism does with its block of columns, leaves a mark.
_MARKS = 16


class _Buffer:
    """Memory for one shard of every site, reused for shard after shard.

    views : site -> bits; uint16 for bfloat16 and float16, else float32.
    checksums : site -> crc32c of each row, uint32, the shape of the view without its last axis.
    shared : whether other processes map it.
    """

    def __init__(self, dtype: str, rows: int, shared: bool) -> None:
        self.dtype, self.shared = dtype, shared
        self.views: dict[str, np.ndarray] = {}
        self.checksums: dict[str, np.ndarray] = {}
        self._descriptors: dict[str, int] = {}
        self._marked = np.zeros(rows, bool)

    def _allocate(self, site: str, size: int, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> mmap.mmap:
        if self.shared:
            # A memfd has no name to leak and is mapped by other processes through /proc.
            if not hasattr(os, "memfd_create"):
                raise StoreError("this system has no memfd, so no other process can fill a shard: run it on Linux")
            descriptor = os.memfd_create(f"hiddenlake-{site}")
            os.ftruncate(descriptor, size)
            self._descriptors[site] = descriptor
            memory = mmap.mmap(descriptor, size)
        else:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A sample's rows lie far from each other: each would need a page of its own to be looked up. Most systems
            # have no huge pages for memory that is shared.
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.views[site] = np.ndarray(shape, DTYPES[self.dtype][0], memory, 0, strides)
        self.checksums[site] = np.empty(shape[:-1], "<u4")
        return memory

    @property
    def nan(self) -> Any:
        """The bits of NaN."""
        return DTYPES[self.dtype][2]

    def clear(self, rows: int | slice) -> None:
        """Forget what rows held, before they are handed out, so that one that nobody writes is noticed.

        rows : index before the width: a slot, or tokens.
        """
        if not self._marked[rows].all():
            self._mark(rows)
        self._marked[rows] = False

    def renew(self) -> None:
        """Forget what all rows held: sooner done than row by row, and while another buffer is being filled."""
        self._mark(slice(None))
        self._marked[:] = True

    def _mark(self, rows: int | slice) -> None:
        """Put NaN here and there into rows. Not everywhere: that would write all memory twice."""
        for view in self.views.values():
            view[..., rows, :: _mark(view)] = self.nan
            view[..., rows, -1] = self.nan

    def _fill(self, rows: Any) -> None:
        """Fill rows with NaN: what absent cells, free slots and tokens of no sample hold."""
        for site, view in self.views.items():
            view[..., rows, :] = self.nan
            self.checksums[site][..., rows] = self.nan_checksum(site)

    def nan_checksum(self, site: str) -> int:
        """crc32c of a row of NaN."""
        view = self.views[site]
        return crc32c(np.full(view.shape[-1], self.nan, view.dtype))

    def handle(self, number: int, fencing: int) -> dict[str, Any]:
        if not self.shared:
            raise StoreError("no other process can fill this shard: open the writer with shared=True")
        arrays = {}
        for site, view in self.views.items():
            memory = os.fstat(self._descriptors[site])
            arrays[site] = {
                "fd": self._descriptors[site],
                "inode": memory.st_ino,
                "size": memory.st_size,
                "shape": list(view.shape),
                "strides": list(view.strides),
            }
        return {"pid": os.getpid(), "shard": number, "fencing": fencing, "dtype": self.dtype, "arrays": arrays}

    def close(self) -> None:
        """Close the descriptors, and let go of the memory, which goes with the last view of it that others have."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self.views.clear()
        self.checksums.clear()


class ShardBuffer(_Buffer):
    """Memory for one sample shard.

    views : site -> (layer, position, sample, width) of bits, or (position, sample, width) for a site without layers.
        Where chunks are stored as they are, the memory is the file, byte for byte.
    """

    def __init__(self, layout: Layout, shared: bool) -> None:
        super().__init__(layout.coverage.dtype, layout.samples, shared)
        self.layout = layout
        self._images: dict[str, np.ndarray] = {}
        for site, file in layout.files.items():
            plain = replace(file, codec="none")
            image = self._allocate(site, plain.size, plain.shape, plain.strides)
            if layout.codec == "none":
                self._images[site] = np.frombuffer(image, np.uint8)
                lengths = np.full(len(file.present), file.chunk_bytes)
                self._images[site][-file.index_bytes :] = np.frombuffer(file.index(lengths), np.uint8)

    def close(self) -> None:
        """See _Buffer."""
        super().close()
        self._images.clear()

    def empty(self, slot: int) -> None:
        """A slot holds no sample."""
        self._fill(slot)

    def finish(self, slot: int, present: np.ndarray) -> None:
        """Keep the checksums of a sample's rows, which do not change from here on.

        present : (position,) bool, whether there is something to store.

        Raises CaptureError where a row that is present is not finite, or one that is absent is not NaN.
        """
        every = bool(present.all())
        for site, view in self.views.items():
            rows = view[..., slot, :]
            checksums, finite = _checksums(rows, self.dtype) if every else (None, False)
            if not finite:
                self._check(site, rows, present)
            if not every:
                rows[..., ~present, :] = self.nan  # until here it may hold NaN in some places only
                checksums = row_checksums(rows)
            self.checksums[site][..., slot] = checksums.reshape(rows.shape[:-1])

    def _check(self, site: str, rows: np.ndarray, present: np.ndarray) -> None:
        marks = np.concatenate([rows[..., :: _mark(rows)], rows[..., -1:]], -1)
        if rows.dtype == np.uint16:
            infinity = np.uint16(INFINITY[self.dtype])
            bad = (rows & infinity) == infinity
            nan = ((marks & infinity) == infinity) & ((marks & ~(infinity | np.uint16(0x8000))) != 0)
        else:
            bad, nan = ~np.isfinite(rows), np.isnan(marks)
        wrong = np.where(present, bad.any(-1), ~nan.all(-1))
        if wrong.any():
            cell, coverage = [int(axis[0]) for axis in np.nonzero(wrong)], self.layout.coverage
            layer = f"layer {coverage.layers[cell[0]]}, " if len(cell) == 2 else ""
            found = "not finite" if present[cell[-1]] else "there, though its token is absent"
            raise CaptureError(
                f"{site}, {layer}position {coverage.positions[cell[-1]]} is {found} "
                f"({int(wrong.sum())} of {wrong.size} cells): the sample is not stored; capture it again"
            )

    def seal(self) -> dict[str, Encoding]:
        """The bytes of each site's file. They are in memory that is used again, so write them before that."""
        return {site: self._seal(site, file) for site, file in self.layout.files.items()}

    def _seal(self, site: str, file: ShardFile) -> Encoding:
        checksums = self.checksums[site].reshape(-1, file.rows)
        if site not in self._images:
            view = self.views[site].reshape(-1, file.rows, file.width)
            return Encoding(file, lambda number: view[number], checksums.copy())
        return Encoding.of_image(file, self._images[site], checksums.copy())


class TokenBuffer(_Buffer):
    """Memory for one token shard.

    views : site -> (layer, token, width) of bits, or (token, width) for a site without layers.
    """

    def __init__(self, layout: Layout, shared: bool) -> None:
        super().__init__(layout.coverage.dtype, layout.shard_tokens, shared)
        self.layout = layout
        for site, file in layout.token_files.items():
            shape = (*file.outer[:-1], layout.shard_tokens, file.width)
            self._allocate(site, int(np.prod(shape)) * file.bits.itemsize, shape, None)

    def finish(self, rows: slice) -> None:
        """Keep the checksums of rows, which do not change from here on.

        Raises CaptureError where a value is not finite.
        """
        for site, view in self.views.items():
            blocks = view[..., rows, :].reshape(-1, rows.stop - rows.start, view.shape[-1])
            checksums = self.checksums[site].reshape(-1, view.shape[-2])
            # Layer by layer, so that a block is read from memory once.
            for layer, block in enumerate(blocks):
                checksums[layer, rows], finite = _checksums(block, self.dtype)
                if not finite:
                    number = self.layout.coverage.layers[layer]
                    where = f"{site}, layer {number}" if view.ndim == 3 else site
                    raise CaptureError(f"{where}: a token's row is not finite, or was never written: capture it again")

    def seal(self, kept: Iterable[slice]) -> tuple[int, dict[str, Encoding]]:
        """Make everything but the kept rows a hole.

        Returns (how many chunks along the token axis are in the files, site -> the file's bytes). They are in memory
        that is used again, so write them before that.
        """
        T = self.layout.chunk_tokens
        used = np.zeros(self.layout.shard_tokens, bool)
        for rows in kept:
            used[rows] = True
        columns = int(np.flatnonzero(used)[-1]) // T + 1
        edges = np.flatnonzero(np.diff(used[: columns * T], prepend=True, append=True))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            self._fill(slice(start, stop))
        sealed = {}
        for site, full in self.layout.token_files.items():
            self.checksums[site][..., ~used] = self.nan_checksum(site)
            file = replace(full, columns=columns)
            chunks = self.views[site].reshape(-1, file.rows, file.width)
            checksums = self.checksums[site].reshape(-1, file.rows).copy()
            sealed[site] = Encoding(file, chunks.__getitem__, checksums)
        return columns, sealed


def _mark(rows: np.ndarray) -> int:
    """Elements from one mark to the next."""
    return max(1, rows.shape[-1] // _MARKS)


def _checksums(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, bool]:
    """crc32c of each row, (rows,) uint32, and whether all values are finite."""
    checksums, finite = [np.empty(0, np.uint32)], True
    for piece, crcs in checked_pieces(rows):
        checksums.append(crcs)
        finite = finite and _all_finite(piece, dtype)
    return np.concatenate(checksums), finite


def _all_finite(bits: np.ndarray, dtype: str) -> bool:
    if bits.dtype == np.uint16:
        # Infinities and NaN are above all finite values of their sign.
        infinity = INFINITY[dtype]
        return bool(bits.max(initial=0) < infinity | 0x8000 and bits.view(np.int16).max(initial=0) < infinity)
    return bool(np.isfinite(bits).all())


@dataclass(frozen=True, slots=True)
class Shard:
    """One claimed sample shard and the buffer that its rows go to.

    number : k.  fencing : grows when a dead writer's claim is taken over.
    """

    number: int
    fencing: int
    buffer: ShardBuffer

    @property
    def views(self) -> dict[str, np.ndarray]:
        """site -> bits, (layer, position, sample, width) or (position, sample, width). Write to [..., slot, :]."""
        return self.buffer.views

    @property
    def handle(self) -> dict[str, Any]:
        """What another process of this host needs to fill the shard: JSON, for `attach`."""
        return self.buffer.handle(self.number, self.fencing)


@dataclass(frozen=True, slots=True)
class TokenShard:
    """One claimed token shard and the buffer that its rows go to.

    number : along the token axis.  fencing : grows when a dead writer's claim is taken over.
    """

    number: int
    fencing: int
    buffer: TokenBuffer

    @property
    def views(self) -> dict[str, np.ndarray]:
        """site -> bits, (layer, token, width) or (token, width). Write to the rows of a piece."""
        return self.buffer.views

    @property
    def handle(self) -> dict[str, Any]:
        """What another process of this host needs to fill the shard: JSON, for `attach`."""
        return self.buffer.handle(self.number, self.fencing)


_attached: OrderedDict[tuple[int, int], tuple[int, mmap.mmap]] = OrderedDict()
_attached_lock = threading.Lock()


def attach(handle: dict[str, Any]) -> dict[str, np.ndarray]:
    """Map another process's shard buffer. Its rows are written into the views in place.

    handle : `Shard.handle` or `TokenShard.handle`, maybe after a trip through JSON.

    Returns site -> bits, (layer, position, sample, width), of a token shard (layer, token, width), without layer
    for a site that has none; uint16 for bfloat16, else float32. Mappings are kept, so that attaching to each shard
    costs nothing.

    Raises StoreError when the process or its buffer is gone.
    """
    bits = DTYPES[handle["dtype"]][0]
    return {site: _attach(handle["pid"], bits, **array) for site, array in handle["arrays"].items()}


def _attach(
    pid: int, bits: np.dtype, fd: int, inode: int, size: int, shape: list[int], strides: list[int]
) -> np.ndarray:
    with _attached_lock:
        known = _attached.get((pid, fd))
        if known is None or known[0] != inode:
            known = _attached[pid, fd] = inode, _map(pid, fd, inode, size)
        _attached.move_to_end((pid, fd))
        while len(_attached) > _MAPPINGS:
            _attached.popitem(last=False)
    return np.ndarray(shape, bits, known[1], 0, strides)


def _map(pid: int, fd: int, inode: int, size: int) -> mmap.mmap:
    path = f"/proc/{pid}/fd/{fd}"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}: the shard buffer of process {pid} cannot be mapped; both processes must run "
            f"on one host, in one PID namespace and as one user, and the writer must still be open"
        ) from error
    try:
        found = os.fstat(descriptor)
        if (found.st_ino, found.st_size) != (inode, size):
            raise StoreError(
                f"{path} is not the shard buffer of the handle (inode {found.st_ino}, {found.st_size} bytes; expected "
                f"{inode}, {size}): its writer was closed; take a new handle from `writer.slot()`"
            )
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
