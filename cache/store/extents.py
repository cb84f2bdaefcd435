"""Extents: values as they lie in files, for whoever lets the kernel copy them.

It may hand out a file's own pages, and so what is written to them later; committed files are never written to again.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hiddenlake.cache.store.backend import File

# Of these bytes the one in the middle is looked for in memory: as the kernel reads ahead, the others come and go with it.
_PROBE_BYTES = 256 << 10


class Extent(NamedTuple):
    """length bytes of a local file from offset on."""

    file: File
    offset: int
    length: int


def size(extents: Iterable[Extent]) -> int:
    """Their bytes."""
    return sum(extent.length for extent in extents)


def in_memory(extents: Iterable[Extent]) -> bool:
    """Whether they can be copied without waiting for a disk, as far as a look at one byte in many tells."""
    byte = np.empty(1, np.uint8)
    for file, offset, length in extents:
        for at in range(offset + min(length, _PROBE_BYTES) // 2, offset + length, _PROBE_BYTES):
            if not file.read_cached(at, byte):
                return False
    return True
