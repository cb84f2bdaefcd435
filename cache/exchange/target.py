"""Target: a folder that appears under its name complete, with a checksum of every file, or not at all."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.files import fsync_folder, remove_tree
from hiddenlake.cache.store.locks import in_use

MANIFEST = "manifest.json"
_LOCK = ".lock"
_SUFFIX = ".exporting"

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EFBIG: "a file may not become that large here: lower --shard-bytes, or raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: name a folder that can be written",
    errno.EACCES: "permission is missing: name a folder that you may write",
    errno.EPERM: "permission is missing: name a folder that you may write",
}


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "check the folder")
        raise StoreError(
            f"{path}: {error.strerror or error}: {remedy}, then run the same command again; nothing was left behind"
        ) from error


class TargetFile:
    """One file of a target, written front to back; size and SHA-256 go to the manifest. A context manager, and what
    other libraries take for a file to write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.closed = False
        self._hash = hashlib.sha256()
        with _storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)

    def write(self, data: Any) -> int:
        """Append bytes, or a C-contiguous array as it lies in memory. Returns their number."""
        # arrays of ml_dtypes have no buffer interface of their own
        view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data).cast("B")
        self._hash.update(view)
        count = rest = view.nbytes
        with _storing(self.path):
            while rest:
                rest -= os.write(self._descriptor, view[count - rest :])
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Make the file durable; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            with _storing(self.path):
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    @property
    def record(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Target:
    """A folder while it is built. files : name -> its bytes and SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TargetFile] = {}

    def open(self, name: str) -> TargetFile:
        """A new file. name : relative, with `/`."""
        self._files[name] = TargetFile(self.folder / name)
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return {name: self._files[name].record for name in sorted(self._files)}

    def close(self) -> None:
        for file in self._files.values():
            with suppress(StoreError):
                file.close()


def check_absent(path: Path) -> None:
    """Raise StoreError where there is something at `path`."""
    if os.path.lexists(path):
        raise StoreError(f"{path} exists already: name another folder, or remove it; nothing is written over")


@contextmanager
def building(path: Path, facts: dict[str, Any]) -> Iterator[Target]:
    """Build a folder beside its place; on leaving, the manifest is written and the folder is renamed.

    facts : what the manifest says beside the files.

    Whatever is raised inside, Ctrl-C included, takes the unfinished folder away again. What a killed process left is
    removed by the next one.

    Raises StoreError where `path` exists, also when it came to be in the meantime.
    """
    check_absent(path)
    with _storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
        folder.mkdir()
    target = Target(folder)
    lock = None
    try:
        with _storing(path):
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield target
        manifest = facts | {"files": target.files}
        target.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        with _storing(path):
            os.unlink(folder / _LOCK)
            for made in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
                fsync_folder(made)
            check_absent(path)
            os.rename(folder, path)
            fsync_folder(path.parent)
    except BaseException:
        target.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _sweep(path: Path) -> None:
    """Remove what processes left that died while they built `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        if not in_use(left, _LOCK):
            remove_tree(left)
