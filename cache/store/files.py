"""Durable files: the only module that creates, renames, links and fsyncs what a capture holds.

A file appears under its name complete or not at all: it is written beside its name, fsynced, renamed,
and the folder is fsynced. After a failed fsync the pages are gone for good, so the file is abandoned
and never fsynced a second time.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from hiddenlake.cache.errors import StoreError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again; it resumes what is committed",
    errno.EDQUOT: "the quota is used up: free some space and run the same command again; it resumes what is committed",
    errno.EIO: "the disk reported an error: check it (dmesg), then run the same command again; what is committed stays",
    errno.EROFS: "the file system is read-only: name a folder that can be written",
    errno.EACCES: "permission is missing: name a folder that you may write, or change its owner",
    errno.EPERM: "permission is missing: name a folder that you may write, or change its owner",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}

_CREATING_SECONDS = 60  # far longer than the microseconds between making a folder and locking it


@contextmanager
def storing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "check the folder, then run the same command again")
        raise StoreError(f"{path}: {error.strerror or error}: {remedy}") from error


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create one folder durably; one that exists is fine."""
    with storing(folder), suppress(FileExistsError):
        os.mkdir(folder)
        fsync_folder(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def final_name(temporary: str) -> str | None:
    """The name that an unfinished file was meant to get, or None when it is no unfinished file."""
    if temporary.startswith(".") and temporary.endswith(".partial") and temporary.count(".") >= 3:
        return temporary[1:].rsplit(".", 2)[0]
    return None


def _write_all(descriptor: int, data) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _write_temporary(path: Path, parts: Sequence, preallocate: bool = False) -> Path:
    """Write and fsync the parts, one behind the other, beside `path`. Whatever fails, no unfinished file is left where
    that can be helped."""
    temporary = _temporary(path)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        try:
            if preallocate and hasattr(os, "posix_fallocate"):
                try:
                    # The blocks are found once, and a full disk is known before the long write.
                    os.posix_fallocate(descriptor, 0, sum(memoryview(part).nbytes for part in parts))
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            for part in parts:
                _write_all(descriptor, part)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def write_atomic(path: str | os.PathLike, *parts, preallocate: bool = False) -> None:
    """Write a file so that a reader sees the old one or the new one, durably on return.

    parts : bytes or C-contiguous buffers, written one behind the other in one sequential pass without a copy.
    preallocate : reserve the blocks first; worth it for shards.

    Raises StoreError.
    """
    path = Path(path)
    with storing(path):
        temporary = _write_temporary(path, parts, preallocate)
        try:
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def create_exclusive(path: str | os.PathLike, data: bytes) -> bool:
    """Create a file with its whole content, unless it exists. Returns whether this call created it.

    O_EXCL alone would show an empty file first; a hard link to a finished file does not.

    Raises StoreError.
    """
    path = Path(path)
    with storing(path):
        temporary = _write_temporary(path, [data])
        try:
            os.link(temporary, path)
            created = True
        except FileExistsError:
            created = False
        finally:
            os.unlink(temporary)
        fsync_folder(path.parent)
    return created


def create_folder(path: Path, files: dict[str, bytes], folders: Iterable[str], lock: str) -> bool:
    """Create a folder with its whole content, unless it exists and is not empty. Returns whether this call did.

    It is built beside its place and renamed, so that no other process sees half of it.
    lock : file inside the folder that is held with flock while it is built, so that what a dead process
        left can be told from what a living one is building.

    Raises StoreError.
    """
    with storing(path):
        os.makedirs(path.parent, exist_ok=True)
        _sweep_folders(path, lock)
        building = path.with_name(f".{path.name}.{secrets.token_hex(4)}.creating")
        os.makedirs((building / lock).parent)
        with FileLock(building / lock):
            try:
                made = {building}
                for name in sorted({*folders, *(str(Path(file).parent) for file in (*files, lock))}):
                    os.makedirs(building / name, exist_ok=True)
                    made |= {building / name, *(p for p in (building / name).parents if building in p.parents)}
                for name, data in files.items():
                    descriptor = os.open(building / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                    try:
                        _write_all(descriptor, data)
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                for folder in made:
                    fsync_folder(folder)
                try:
                    os.rename(building, path)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    shutil.rmtree(building)
                    return False
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
        fsync_folder(path.parent)
    return True


def _sweep_folders(path: Path, lock: str) -> None:
    """Remove what processes left that died while they created `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):
        with suppress(FileNotFoundError):
            # Making the folder and locking it are two steps, so the newest are left alone.
            old = time.time() - os.stat(left).st_mtime > _CREATING_SECONDS
            if old and not ((left / lock).exists() and is_locked(left / lock)):
                shutil.rmtree(left, ignore_errors=True)


def remove(path: str | os.PathLike) -> None:
    """Remove a file; one that is not there is fine."""
    with storing(path), suppress(FileNotFoundError):
        os.unlink(path)


class FileLock:
    """An exclusive flock on a file, held until `release`, or until the process dies.

    A forked child drops its copy of the descriptor, so that the lock lives and dies with the process
    that took it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with storing(path):
            self.descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(self.descriptor)
                raise
        _held.add(self)

    def append(self, data: bytes) -> None:
        """Append to the locked file; visible to other processes at once."""
        with storing(self.path):
            _write_all(self.descriptor, data)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self.descriptor is not None:
            # Unlocked and not only closed: a child that was just forked may still hold a copy.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close this process's copy; the lock stays with the process that took it."""
        _held.discard(self)
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()


_held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _drop_inherited_locks() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_drop_inherited_locks)


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a living process holds the flock of a file.

    Raises FileNotFoundError where the file does not exist.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
