"""What this machine could do at most: bandwidth of its memory and of a disk."""

import os
import time
from pathlib import Path

import numpy as np

_COPY_BYTES = 256 << 20  # far beyond any cache
_FILE_BYTES = 128 << 20


def copy_bandwidth() -> float:
    """Bytes a second of one thread that copies memory: each counts once, though it is read and written."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    target.fill(0)  # first use of a page costs more than a copy
    start = time.perf_counter()
    np.copyto(target, source)
    return _COPY_BYTES / (time.perf_counter() - start)


def disk_bandwidth(folder: Path) -> float:
    """Bytes a second of one file that is written and fsynced."""
    data = np.random.default_rng(0).integers(0, 255, _FILE_BYTES, dtype=np.uint8).tobytes()
    file = folder / "bandwidth"
    start = time.perf_counter()
    with file.open("wb") as raw:
        raw.write(data)
        os.fsync(raw.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return _FILE_BYTES / seconds
