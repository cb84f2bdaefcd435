"""Durable files: the only module that opens, reads, writes, renames, links and fsyncs what a local capture holds.

A file appears under its name complete or not at all: it is written beside its name, fsynced, renamed,
and the folder is fsynced. After a failed fsync the pages are gone for good, so the file is abandoned
and never fsynced a second time.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

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

# What is at least so long is written past the page cache, in whole blocks: multiples of any disk's.
_PAST_CACHE, _BLOCK = 8 << 20, 4096


@contextmanager
def storing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        raise trouble(path, error) from error


def trouble(path: str | os.PathLike, error: OSError) -> StoreError:
    """What went wrong with a file, and what to do."""
    remedy = _REMEDIES.get(error.errno, "check the folder, then run the same command again")
    return StoreError(f"{path}: {error.strerror or error}: {remedy}")


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def final_name(temporary: str) -> str | None:
    """The name that an unfinished file was meant to get, or None when it is no unfinished file."""
    if temporary.startswith(".") and temporary.endswith(".partial") and temporary.count(".") >= 3:
        return temporary[1:].rsplit(".", 2)[0]
    return None


def write_all(descriptor: int, data) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _write_past_cache(descriptor: int, view: memoryview) -> int:
    """Write whole blocks from memory to the disk, past the page cache. descriptor : at a multiple of _BLOCK.

    Through the page cache a GB takes the kernel 0.6 s of a processor, past it 0.15 s, and nothing that others read is
    driven out of memory. Whoever reads the file first has to wait for the disk.

    Returns the bytes written: none where the system, the file system, or where the memory lies, do not allow it.
    """
    if not hasattr(os, "O_DIRECT"):
        return 0
    flags, written, blocks = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0, len(view) // _BLOCK * _BLOCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < blocks:
            written += os.write(descriptor, view[written:blocks])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return written


class Unfinished:
    """A file that is written and not yet durable, beside the name that it is to get."""

    def __init__(self, path: Path) -> None:
        self.path = _temporary(path)
        self._descriptor: int | None = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)

    def write(self, parts: Iterable, size: int | None) -> None:
        """size : of all parts, to reserve the blocks; worth it for shards."""
        if size is not None and hasattr(os, "posix_fallocate"):
            try:
                # The blocks are found once, and a full disk is known before the long write.
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        at = 0
        for part in parts:
            view = memoryview(part).cast("B")
            length = len(view)
            if length >= _PAST_CACHE and at % _BLOCK == 0:
                view = view[_write_past_cache(self._descriptor, view) :]
            write_all(self._descriptor, view)
            at += length

    def sync(self) -> None:
        """Durable, but for its name."""
        os.fsync(self._descriptor)
        self._close()

    def rename(self, path: Path) -> None:
        self._close()
        os.rename(self.path, path)

    def discard(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            os.unlink(self.path)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def write_beside(path: Path, parts: Iterable, size: int | None = None) -> Unfinished:
    """Write the parts, one behind the other, beside `path`: bytes or C-contiguous buffers, without a copy.

    Whatever fails, no unfinished file is left where that can be helped.
    """
    unfinished = Unfinished(path)
    try:
        unfinished.write(parts, size)
    except BaseException:
        unfinished.discard()
        raise
    return unfinished


def write_atomic(path: str | os.PathLike, data: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one.

    durable : whether it survives a power cut once this returns; without that, either one may, or an empty one.

    Raises StoreError.
    """
    path = Path(path)
    with storing(path):
        unfinished = write_beside(path, [data])
        try:
            if durable:
                unfinished.sync()
            unfinished.rename(path)
        except BaseException:
            unfinished.discard()
            raise
        if durable:
            fsync_folder(path.parent)


def create_exclusive(path: str | os.PathLike, data: bytes, durable: bool = True) -> bool:
    """Create a file with its whole content, unless it exists. Returns whether this call created it.

    O_EXCL alone would show an empty file first; a hard link to a finished file does not.

    Raises StoreError.
    """
    path = Path(path)
    with storing(path):
        unfinished = write_beside(path, [data])
        try:
            if durable:
                unfinished.sync()
            os.link(unfinished.path, path)
            created = True
        except FileExistsError:
            created = False
        finally:
            unfinished.discard()
        if durable:
            fsync_folder(path.parent)
    return created


def make_durable(path: str | os.PathLike) -> None:
    """A file, and its name.

    Raises StoreError.
    """
    path = Path(path)
    with storing(path):
        descriptor = open_read(path)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fsync_folder(path.parent)


def fill_folder(building: Path, contents: dict[str, bytes], folders: set[str]) -> None:
    """Make files and folders inside a new folder, all durable. Raises OSError."""
    made = {building}
    for name in sorted({*folders, *(str(Path(file).parent) for file in contents)}):
        os.makedirs(building / name, exist_ok=True)
        made |= {building / name, *(p for p in (building / name).parents if building in p.parents)}
    for name, data in contents.items():
        descriptor = os.open(building / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in made:
        fsync_folder(folder)


def make_folders(path: Path) -> None:
    """Make a folder, and those that it lies in, durable; one that is there is fine.

    Raises StoreError.
    """
    with storing(path):
        _make_folders(path)


def _make_folders(path: Path) -> None:
    if path.is_dir():
        return
    _make_folders(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():  # else another process was faster
            raise
    # A folder whose own name is lost takes with it all that was made durable inside.
    fsync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder that nobody uses, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(where, name), follow_symlinks=False).st_blocks * 512
    return total


def delete_folder(path: Path) -> None:
    """Remove a folder and all that it holds. It is renamed first, so that nobody sees half of it.

    Raises StoreError.
    """
    with storing(path):
        leaving = path.with_name(f".{path.name}.{secrets.token_hex(4)}.removing")
        os.rename(path, leaving)
        fsync_folder(path.parent)
        shutil.rmtree(leaving)


def exchange(first: Path, second: Path) -> None:
    """Two folders of one file system change places, in one step where the system can do that.

    Raises StoreError.
    """
    with storing(first):
        if not _exchange(first, second):
            aside = first.with_name(f".{first.name}.{secrets.token_hex(4)}.removing")
            os.rename(first, aside)
            os.rename(second, first)
            os.rename(aside, second)
        for folder in {first.parent, second.parent}:
            fsync_folder(folder)


def _exchange(first: Path, second: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE, which Python does not have. Returns False where the system lacks it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(first))


def remove(path: str | os.PathLike) -> None:
    """Remove a file; one that is not there is fine."""
    with storing(path), suppress(FileNotFoundError):
        os.unlink(path)


def check_size(size: int, most: int | None) -> None:
    """Raise OSError for more bytes than there may be."""
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, but such a file has at most {most}")


def read(path: Path, most: int | None = None) -> bytes:
    """A whole file. most : bytes that it may have. Raises OSError."""
    descriptor = open_read(path)
    try:
        size = descriptor_size(descriptor)
        check_size(size, most)
        out = np.empty(size, np.uint8)
        pread_into(descriptor, out, 0)
        return out.tobytes()
    except EOFError as error:
        raise OSError(errno.EIO, "it became shorter while it was read") from error
    finally:
        os.close(descriptor)


def open_read(path: Path) -> int:
    """A descriptor. A symbolic link is not followed: what a capture holds lies in its folder. Raises OSError."""
    try:
        # A pipe would be waited for, until somebody writes into it.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which no capture holds") from error
        raise


def close(descriptor: int) -> None:
    os.close(descriptor)


def descriptor_size(descriptor: int) -> int:
    """Bytes of an open file. Raises OSError for anything else."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return found.st_size


def pread_into(descriptor: int, out: np.ndarray, offset: int) -> None:
    """Fill out, (n,) uint8. Raises EOFError where the file ends before that, OSError."""
    got = os.preadv(descriptor, (out,), offset)
    while got < out.nbytes:
        # A signal, or a range above the kernel's 2 GiB, ends a read early.
        more = os.preadv(descriptor, (out[got:],), offset + got)
        if not more:
            raise EOFError(f"the file ends at byte {offset + got}")
        got += more


def pread_cached(descriptor: int, out: np.ndarray, offset: int) -> bool:
    """Fill out, if all of it is in memory."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, (out,), offset, os.RWF_NOWAIT) == out.nbytes
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False


def will_need(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel what will be read, so that a cold disk works on all of it at once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def size(path: Path) -> int:
    """Bytes that a file takes. Raises OSError."""
    return os.stat(path, follow_symlinks=False).st_size


def identity(path: Path) -> tuple[int, int]:
    """Device and inode of a folder. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def free_bytes(folder: Path) -> int:
    """Bytes that the file system of a folder has left. The folder need not exist. Raises OSError."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def list_files(folder: Path) -> list[str]:
    """Names of what a folder holds, but for folders; none where there is no such folder. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, also of links to folders. Raises OSError."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir()]
