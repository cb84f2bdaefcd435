"""Files of an arm, from outside: made durable, thrown out of the page cache, counted; and what its process did."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_of(folder: Path) -> Iterator[Path]:
    for path, _, names in os.walk(folder):
        yield from (Path(path, name) for name in names)


def bytes_of(folder: Path) -> int:
    """Bytes of all files, as their sizes say."""
    return sum(file.stat().st_size for file in files_of(folder))


def make_durable(folder: Path) -> None:
    """fsync of every file and folder, as somebody must do whose store does not."""
    for path, _, names in os.walk(folder):
        for each in (*(os.path.join(path, name) for name in names), path):
            descriptor = os.open(each, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def evict(folder: Path) -> None:
    """Throw all files out of the page cache. Pages that are dirty or mapped stay."""
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Read all files from their beginning to their end, which brings them into the page cache.

    In order, since the kernel then makes it of large pages; what random reads bring, it keeps in pages of 4 KiB, which
    take twice as long to copy.
    """
    buffer = bytearray(8 << 20)
    for file in files_of(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def fetched() -> int:
    """Bytes that this process has had read from storage, read-ahead included."""
    return _field("/proc/self/io", "read_bytes:")


def forget_peak() -> int:
    """Start measuring the process's peak memory anew. Returns the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * _field("/proc/self/status", "VmRSS:")


def peak() -> int:
    """Most bytes of memory since `forget_peak`, files that are mapped included."""
    return 1024 * _field("/proc/self/status", "VmHWM:")


def _field(file: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))
