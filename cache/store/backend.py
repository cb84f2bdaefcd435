"""Backends: where a capture's files lie. The store does everything through these few operations.

Names are relative to the capture, with slashes. Reading raises OSError (FileNotFoundError for what is absent), writing
StoreError that says what to do. Files are written into folders that `make` was given. Backends can be pickled, so that
other processes open the same place. `hiddenlake.cache.testing` holds the tests that every backend passes.
"""

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np


class File(Protocol):
    """One file, open for positioned reads, from several threads at once. When its name is removed or used for another
    file, it still gives the bytes that were there when it was opened, or raises OSError: never others.

    size : in bytes.
    """

    size: int

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill out, (n,) uint8. Raises EOFError where the file ends before that, OSError."""

    def read_cached(self, offset: int, out: np.ndarray) -> bool:
        """The same if nothing needs to be waited for; else False, and `out` holds anything."""

    def will_need(self, offset: int, length: int) -> None:
        """Start to fetch what will be read."""

    def mapped(self) -> np.ndarray | None:
        """All bytes, (size,) uint8, fetched where they are touched; None where that cannot be done. They may be used
        after `close`."""

    def fileno(self) -> int | None:
        """A descriptor by which the kernel copies bytes without us; None where there is none. Good until `close`."""

    def close(self) -> None:
        """Let go of it, once nobody uses it."""


class Batch(Protocol):
    """Files that are to become durable together."""

    def add(self, name: str, parts: Iterable, size: int | None = None) -> None:
        """Hand over a file's bytes, one part behind the other; the parts may be reused when this returns.

        size : of all parts, where it is known before.
        """

    def publish(self) -> None:
        """All files are durable, each complete under its name, when this returns."""

    def discard(self) -> None:
        """Leave nothing behind of what was not published. What was is not touched."""


class Member(Protocol):
    """A writer's standing in a capture."""

    def append(self, data: bytes) -> None:
        """Add to what other writers read of this one. data : without line breaks."""

    def check(self) -> None:
        """Raise StoreError when the others have taken this writer for dead."""

    def leave(self) -> None:
        """End it: what this writer claimed and did not commit no longer counts."""


class Backend(Protocol):
    """Where one capture, or one lake, lies.

    name : the last part of its path.
    exact : whether `lives` is never wrong. Where it may be, a claim is never taken over, only given up for all.
    parallel : how many reads in flight are worth having.
    """

    name: str
    exact: bool
    parallel: int

    def __str__(self) -> str:
        """The path or the URL, as a user writes it."""

    def child(self, name: str) -> "Backend":
        """A folder in this one."""

    def free_bytes(self) -> int | None:
        """Room that is left; None where there is no end of it. The folder need not exist."""

    def list_folders(self) -> list[str]:
        """Names of the folders in this one. None, or FileNotFoundError, where it is not there itself."""

    def generation(self) -> Hashable:
        """What is equal as long as this is the same folder. Raises FileNotFoundError when it is gone.

        Where the backend has no folders that could be told apart, it is always equal: then checksums alone tell.
        """

    def read(self, name: str, most: int | None = None) -> bytes:
        """A whole file. most : raise OSError, before anything is allocated, if it has more bytes."""

    def open(self, name: str) -> File: ...

    def list_files(self, folder: str) -> list[str]:
        """Names of the files in a folder; none where there is no such folder."""

    def size(self, name: str) -> int:
        """In bytes, as it lies there."""

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Readers see the old file or the new one. durable : False for what can be made again."""

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        """Make a file, unless it exists. Returns whether this call did: so the data says who calls, for where an answer
        was lost, it is told by them. One that is not durable yet may be gone, or empty, after a power cut."""

    def settle(self, name: str) -> None:
        """Make durable what was created otherwise."""

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Make a file other, unless it is not `old` any more. Returns whether this call did. Under the lock.

        Raises FileNotFoundError where it is not there.
        """

    def remove(self, name: str) -> None:
        """One that is not there is fine."""

    def batch(self) -> Batch: ...

    def make(self, contents: dict[str, bytes], folders: Sequence[str]) -> bool:
        """Make the capture, if nothing is there; `zarr.json` of `contents` makes it one. Returns whether this call did."""

    def delete(self) -> None:
        """Remove the capture: first what makes it one, then the rest."""

    def final_name(self, name: str) -> str | None:
        """The name that an unfinished file was meant to get, or None when it is no unfinished file."""

    def lock(self) -> AbstractContextManager[None]:
        """The capture's one lock."""

    def join(self, writer: str) -> Member:
        """Become a writer. Under the lock."""

    def writers(self) -> list[str]:
        """Who has joined and not left, nor been forgotten."""

    def lives(self, writer: str) -> bool:
        """Whether a writer is at work, as far as can be known. Under the lock."""

    def appended(self, writer: str) -> list[bytes]:
        """What a writer appended, in any order; nothing of one that is not there."""

    def expel(self, writer: str) -> None:
        """Take a writer for dead: from now on its `check` raises. It stays one of the writers. Under the lock.

        Where `lives` is exact, nothing needs to be done.
        """

    def forget(self, writer: str) -> None:
        """Remove what is left of a dead writer. Under the lock."""


def open_backend(where: "str | Path | Backend") -> Backend:
    """The backend of a path or URL: a local folder, or `s3://bucket/folder`. Nothing is touched yet.

    Raises StoreError where the URL cannot be understood, or obstore is missing.
    """
    if isinstance(where, str) and "://" in where and not where.startswith("file://"):
        from hiddenlake.cache.store.objects import ObjectBackend

        return ObjectBackend(where)
    if isinstance(where, str | Path):
        from hiddenlake.cache.store.local import LocalBackend

        return LocalBackend(Path(str(where).removeprefix("file://")))
    return where
