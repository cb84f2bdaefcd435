"""Locks between processes of one machine, and folders that appear complete: what is made under a lock.

Every call of the system goes through `files`, where tests let it fail.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from hiddenlake.cache.store import files

_CREATING_SECONDS = 60  # far longer than the microseconds between making a folder and locking it


def create_folder(path: Path, contents: dict[str, bytes], folders: Iterable[str], lock: str) -> bool:
    """Create a folder with its whole content, unless it exists and is not empty. Returns whether this call did.

    It is built beside its place and renamed, so that no other process sees half of it.
    contents : file -> its bytes.  folders : that are there besides, empty.
    lock : file inside the folder that is held with flock while it is built, so that what a dead process
        left can be told from what a living one is building.

    Raises StoreError.
    """
    with files.storing(path):
        files.make_folders(path.parent)
        sweep_folders(path, lock)
        building = path.with_name(f".{path.name}.{secrets.token_hex(4)}.creating")
        try:
            files.os.makedirs((building / lock).parent)
            with FileLock(building / lock):
                files.fill_folder(building, contents, {*folders, str(Path(lock).parent)})
                try:
                    files.os.rename(building, path)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    shutil.rmtree(building)
                    return False
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        files.fsync_folder(path.parent)
    return True


def sweep_folders(path: Path, lock: str) -> None:
    """Remove what processes left that died while they created `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):
        if not in_use(left, lock):
            files.remove_tree(left)


def in_use(folder: Path, lock: str) -> bool:
    """Whether somebody makes a folder right now. lock : see create_folder."""
    try:
        # Making the folder and locking it are two steps, so the newest are left alone.
        young = time.time() - files.os.stat(folder).st_mtime <= _CREATING_SECONDS
        return young or is_locked(folder / lock)
    except FileNotFoundError:
        return False
    except OSError:  # not ours: it is in nobody's way
        return True


class FileLock:
    """An exclusive flock on a file, held until `release`, or until the process dies.

    A forked child drops its copy of the descriptor, so that the lock lives and dies with the process
    that took it.

    wait : for whoever holds it; else BlockingIOError is raised.
    """

    def __init__(self, path: str | os.PathLike, wait: bool = True) -> None:
        self.path = Path(path)
        held = None
        with files.storing(path):
            while True:
                self.descriptor = files.os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW, 0o644)
                try:
                    files.descriptor_size(self.descriptor)
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The folder may have been replaced by another while this waited.
                    if _same_file(self.descriptor, path):
                        break
                except BlockingIOError as error:
                    files.os.close(self.descriptor)
                    held = error
                    break
                except BaseException:
                    files.os.close(self.descriptor)
                    raise
                files.os.close(self.descriptor)
        if held is not None:
            raise held
        _held.add(self)

    def append(self, data: bytes) -> None:
        """Append to the locked file; visible to other processes at once."""
        with files.storing(self.path):
            size = files.os.fstat(self.descriptor).st_size
            try:
                files.write_all(self.descriptor, data)
            except BaseException:
                # Half a line would be read by others, for as long as this process lives.
                files.os.ftruncate(self.descriptor, size)
                raise

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
            files.os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _same_file(descriptor: int, path: str | os.PathLike) -> bool:
    try:
        return os.path.samestat(files.os.fstat(descriptor), files.os.stat(path))
    except FileNotFoundError:
        return False


_held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _drop_inherited_locks() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_drop_inherited_locks)


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a living process holds the flock of a file.

    Raises FileNotFoundError where the file does not exist, OSError where it is no file.
    """
    descriptor = files.os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        files.descriptor_size(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        files.os.close(descriptor)
    return False
