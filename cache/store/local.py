"""Local folders as a backend."""

import errno
import mmap
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from hiddenlake.cache.store import files, locks
from hiddenlake.cache.store.files import storing, trouble
from hiddenlake.cache.store.locks import FileLock, is_locked

LOCK = "writers/lock"

# Reads in flight that hide a cold disk's latency, also on few cores.
_PARALLEL = 16


class LocalBackend:
    """See Backend. A writer lives as long as it holds the flock on its file in writers/: a process that dies, lets go."""

    exact = True
    parallel = _PARALLEL

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"LocalBackend({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalBackend) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def child(self, name: str) -> "LocalBackend":
        return LocalBackend(self.path / name)

    def free_bytes(self) -> int:
        return files.free_bytes(self.path)

    def list_folders(self) -> list[str]:
        return files.list_folders(self.path)

    def generation(self) -> Hashable:
        return files.identity(self.path)

    def read(self, name: str, most: int | None = None) -> bytes:
        return files.read(self._at(name), most)

    def open(self, name: str) -> "LocalFile":
        return LocalFile(self._at(name))

    def list_files(self, folder: str) -> list[str]:
        return files.list_files(self._at(f"{folder}/x").parent if folder else self.path)

    def size(self, name: str) -> int:
        return files.size(self._at(name))

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        files.write_atomic(self._to(name), data, durable=durable)

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        return files.create_exclusive(self._to(name), data, durable)

    def settle(self, name: str) -> None:
        files.make_durable(self._to(name))

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        # Whoever replaces holds the lock, which no other process gets meanwhile.
        if self.read(name) != old:
            return False
        self.write(name, new)
        return True

    def remove(self, name: str) -> None:
        files.remove(self._to(name))

    def batch(self) -> "LocalBatch":
        return LocalBatch(self)

    def make(self, contents: dict[str, bytes], folders: Sequence[str]) -> bool:
        return locks.create_folder(self.path, contents, folders, LOCK)

    def delete(self) -> None:
        files.delete_folder(self.path)

    def final_name(self, name: str) -> str | None:
        return files.final_name(name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with storing(self.path / LOCK):
            lock = FileLock(self._at(LOCK))
        with storing(self.path), lock:
            yield

    def join(self, writer: str) -> "LocalMember":
        # Here too: what is too new for the one that makes the capture would else stay for good.
        locks.sweep_folders(self.path, LOCK)
        return LocalMember(self._to(self._file(writer)), self._to("commits/x").parent)

    def writers(self) -> list[str]:
        return [name[:-6] for name in self.list_files("writers") if name.endswith(".jsonl")]

    def lives(self, writer: str) -> bool:
        try:
            return is_locked(self._at(self._file(writer)))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise trouble(self.path / self._file(writer), error) from error

    def appended(self, writer: str) -> list[bytes]:
        with suppress(FileNotFoundError):
            return self.read(self._file(writer)).splitlines()
        return []

    def expel(self, writer: str) -> None:
        """One whose lock is free has no process."""

    def forget(self, writer: str) -> None:
        self.remove(self._file(writer))

    @staticmethod
    def _file(writer: str) -> str:
        return f"writers/{writer}.jsonl"

    def _at(self, name: str) -> Path:
        """Where a file of the capture lies. Raises OSError for a name, or a folder, that leads out of it."""
        parts = name.split("/")
        if name and not all(part not in ("", ".", "..") for part in parts):
            raise OSError(errno.EINVAL, f"{name!r} is no name of a file in a capture")
        folder = ""
        for part in parts[:-1]:
            folder += f"/{part}"
            if os.path.islink(f"{self.path}{folder}"):
                raise OSError(errno.ELOOP, f"{folder[1:]} is a symbolic link, which no capture holds")
        return self.path / name

    def _to(self, name: str) -> Path:
        """The same for writing. Raises StoreError."""
        with storing(self.path / name):
            return self._at(name)


def left_folders(lake: Path, remove: bool) -> list[tuple[Path, int]]:
    """Folders that dead processes left in a lake while they made, removed or compacted a capture, and their bytes."""
    found = []
    for name in files.list_folders(lake):
        if name.startswith(".") and name.endswith((".creating", ".removing", ".compacting")):
            folder = lake / name
            if not locks.in_use(folder, LOCK) and not any(
                map(LocalBackend(folder).lives, LocalBackend(folder).writers())
            ):
                found.append((folder, files.folder_size(folder)))
                if remove:
                    files.remove_tree(folder)
    return found


class LocalMember:
    """See Member: an open file that is locked.

    A writer that is killed may have linked a commit and not fsynced the folder. Others leave its samples out, so
    whoever joins, or leaves, first makes what it counts on durable.

    commits : the folder.
    """

    def __init__(self, file: Path, commits: Path) -> None:
        self._commits = commits
        self._lock = FileLock(file)
        try:
            self._settle()
        except BaseException:
            self._end()
            raise

    def append(self, data: bytes) -> None:
        self._lock.append(data + b"\n")

    def check(self) -> None:
        """A lock that is held is never taken for another."""

    def leave(self) -> None:
        try:
            self._settle()
        finally:
            self._end()

    def _settle(self) -> None:
        with storing(self._commits), suppress(FileNotFoundError):  # the capture was removed
            files.fsync_folder(self._commits)

    def _end(self) -> None:
        try:
            files.remove(self._lock.path)
        finally:
            # Also where the file stays: whoever finds it unlocked knows that its writer is gone.
            self._lock.release()


class LocalBatch:
    """See Batch. `add` writes beside the name; `publish` fsyncs, renames, and fsyncs each folder once."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend
        self._open: list[tuple[Path, files.Unfinished]] = []

    def add(self, name: str, parts: Iterable, size: int | None = None) -> None:
        with storing(self.backend.path / name):
            file = self.backend._at(name)
            self._open.append((file, files.write_beside(file, parts, size)))

    def publish(self) -> None:
        try:
            for file, unfinished in self._open:
                with storing(file):
                    unfinished.sync()
            folders = {}
            while self._open:
                file, unfinished = self._open[0]
                with storing(file):
                    unfinished.rename(file)
                self._open.pop(0)
                folders[file.parent] = None
            for folder in folders:
                with storing(folder):
                    files.fsync_folder(folder)
        finally:
            self.discard()

    def discard(self) -> None:
        while self._open:
            self._open.pop()[1].discard()


class LocalFile:
    """See File."""

    def __init__(self, path: Path) -> None:
        self._descriptor = files.open_read(path)
        self._map: np.ndarray | None = None
        try:
            self.size = files.descriptor_size(self._descriptor)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, out: np.ndarray) -> None:
        files.pread_into(self._descriptor, out, offset)

    def read_cached(self, offset: int, out: np.ndarray) -> bool:
        return files.pread_cached(self._descriptor, out, offset)

    def will_need(self, offset: int, length: int) -> None:
        files.will_need(self._descriptor, offset, length)

    def fileno(self) -> int | None:
        return self._descriptor

    def mapped(self) -> np.ndarray | None:
        if self._map is None and self.size:
            memory = mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                # Else each row that is touched brings megabytes of its neighbours from the disk.
                memory.madvise(mmap.MADV_RANDOM)
            self._map = np.frombuffer(memory, np.uint8)
        return self._map

    def close(self) -> None:
        if self._descriptor is not None:
            files.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # half made, or the interpreter is ending
            pass
