"""Shard buffers: the files of one shard, in memory, filled row by row by whoever has the rows.

The buffer is the file's image, so that publishing is one sequential write: no copy, no transpose.
"""

import mmap
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.files import crc32c
from hiddenlake.cache.store.layout import Layout, ShardFile

# Mappings of other processes' buffers that a process keeps: two buffers x a few sites x a few writers.
_MAPPINGS = 64


def _view(file: ShardFile, image: Any) -> np.ndarray:
    return np.ndarray(file.shape, file.bits, image, 0, file.strides)


class ShardBuffer:
    """Memory for one shard of every site, reused for shard after shard: a slot is cleared before it is handed out.

    images : site -> the file's bytes.  views : site -> (layer, position, sample, width) of bits, or
    (position, sample, width) for a site without layers; uint16 for bfloat16, else float32.
    checksums : site -> crc32c of each row, uint32 (layer, position, sample) or (position, sample).
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.images: dict[str, mmap.mmap] = {}
        self.views: dict[str, np.ndarray] = {}
        self.checksums: dict[str, np.ndarray] = {}
        self.descriptors: dict[str, int] = {}
        for site, file in layout.files.items():
            # A memfd has no name to leak and is mapped by other processes through /proc.
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create(f"hiddenlake-{site}")
                os.ftruncate(descriptor, file.size)
                self.descriptors[site] = descriptor
                image = mmap.mmap(descriptor, file.size)
            else:
                image = mmap.mmap(-1, file.size)
            image[file.index_offset :] = file.index
            self.images[site] = image
            self.views[site] = _view(file, image)
            self.checksums[site] = np.empty(file.shape[:-1], "<u4")

    def clear(self, slot: int) -> None:
        """Fill a slot with NaN: what absent cells and free slots hold, and what betrays a row that nobody wrote."""
        nan = DTYPES[self.layout.coverage.dtype][2]
        for site, view in self.views.items():
            view[..., slot, :] = nan
            self.checksums[site][..., slot] = crc32c(np.full(view.shape[-1], nan, view.dtype))

    def rows(self, slot: int) -> dict[str, np.ndarray]:
        """A copy of one sample's rows: site -> bits, (layer, position, width) or (position, width)."""
        return {site: np.ascontiguousarray(view[..., slot, :]) for site, view in self.views.items()}

    def finish(self, slot: int, rows: dict[str, np.ndarray]) -> None:
        """Keep the checksums of a sample's rows, which do not change from here on."""
        for site, bits in rows.items():
            row = np.dtype((np.void, self.layout.files[site].row_bytes))
            checksums = list(map(google_crc32c.value, bits.reshape(-1).view(row).tolist()))
            self.checksums[site][..., slot] = np.reshape(checksums, bits.shape[:-1])

    def seal(self) -> dict[str, int]:
        """Put each chunk's crc32c into the images. Returns site -> crc32c of the whole file."""
        sealed = {}
        for site, file in self.layout.files.items():
            image = np.frombuffer(self.images[site], np.uint8)
            whole = 0
            for chunk in range(file.chunks):
                # Both checksums in turn, while the chunk lies in the CPU's cache.
                page = image[chunk * file.pitch : (chunk + 1) * file.pitch]
                checksum = google_crc32c.value(page[: file.chunk_bytes])
                page[file.chunk_bytes : file.chunk_bytes + 4] = list(checksum.to_bytes(4, "little"))
                whole = google_crc32c.extend(whole, page)
            sealed[site] = google_crc32c.extend(whole, file.index)
        return sealed

    def close(self) -> None:
        """Close the descriptors; the memory goes when the last view of it does."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


@dataclass(frozen=True, slots=True)
class Shard:
    """One claimed shard and the buffer that its rows go to.

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
        if not self.buffer.descriptors:
            raise StoreError("this system has no memfd, so no other process can fill a shard: run in one process")
        arrays = {}
        for site, file in self.buffer.layout.files.items():
            descriptor = self.buffer.descriptors[site]
            arrays[site] = {
                "fd": descriptor,
                "inode": os.fstat(descriptor).st_ino,
                "outer": list(file.outer),
                "samples": file.samples,
                "width": file.width,
                "dtype": file.dtype,
            }
        return {"pid": os.getpid(), "shard": self.number, "fencing": self.fencing, "arrays": arrays}


_attached: OrderedDict[tuple[int, int], tuple[int, mmap.mmap]] = OrderedDict()
_attached_lock = threading.Lock()


def attach(handle: dict[str, Any]) -> dict[str, np.ndarray]:
    """Map another process's shard buffer. Its rows are written into the views in place.

    handle : `Shard.handle`, maybe after a trip through JSON.

    Returns site -> bits, (layer, position, sample, width), or (position, sample, width) for a site without
    layers; uint16 for bfloat16, else float32. Mappings are kept, so that attaching to each shard costs nothing.

    Raises StoreError when the process or its buffer is gone.
    """
    return {site: _attach(handle["pid"], **array) for site, array in handle["arrays"].items()}


def _attach(pid: int, fd: int, inode: int, outer: list[int], samples: int, width: int, dtype: str) -> np.ndarray:
    file = ShardFile(tuple(outer), samples, width, dtype)
    with _attached_lock:
        known = _attached.get((pid, fd))
        if known is None or known[0] != inode:
            known = _attached[pid, fd] = inode, _map(pid, fd, inode, file.size)
        _attached.move_to_end((pid, fd))
        while len(_attached) > _MAPPINGS:
            _attached.popitem(last=False)
    return _view(file, known[1])


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
