"""Checkpoint: the finished cells of a grid in progress, each in a file of its own, shared by all who work on it.

    .<name>.cells/                 beside the grid <name>, from its first finished cell until it is saved
      lock  members/               who works on it
      <request>/<i>.<j>.npz        the cell of layer number i and position number j
      <request>/<i>.<j>.lock       held by whoever works on that cell

A request is a digest of all that decides the numbers, so that no other grid's cells are ever taken. Locks only spare
work: two who fit one cell write the same file.
"""

import io
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store import files
from hiddenlake.cache.store.locks import FileLock, is_locked
from hiddenlake.probing.cell import Cell
from hiddenlake.probing.solvers import torch

# Counted up with whatever changes the numbers of a cell.
RULES = 3


class Checkpoint:
    """Finished cells of one request.

    folder : of all requests of one grid.
    decides : name -> what decides the numbers: arrays, and values whose repr says it.
    """

    def __init__(self, folder: Path, decides: dict[str, Any]) -> None:
        versions = [library.__version__ for library in (torch, np, scipy, sklearn)]
        found = sha256(f"{RULES} {version('hiddenlake')} {versions}".encode())
        for name, value in sorted(decides.items()):
            if isinstance(value, np.ndarray):
                content = repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
                value = f"{value.dtype.str} {value.shape} {sha256(content).hexdigest()}"
            elif isinstance(value, np.generic):
                value = value.item()  # 5 is 5, whoever counted it
            found.update(f"\n{name} {value!r}".encode())
        self.folder = folder / found.hexdigest()[:32]
        files.make_folders(self.folder)

    def load(self, cell: tuple[int, int]) -> Cell | None:
        """A finished cell, or None. Raises CorruptError."""
        path = self._path(cell, "npz")
        try:
            raw = files.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise files.trouble(path, error) from error
        try:
            return unpack(raw)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise CorruptError(
                f"{path}: not a finished cell ({error}): remove it, and run the same command again"
            ) from error

    def claim(self, cell: tuple[int, int]) -> FileLock | None:
        """The right to fit a cell, or None while another one, on a thread or in a process, has it."""
        try:
            return FileLock(self._path(cell, "lock"), wait=False)
        except BlockingIOError:
            return None

    def save(self, cell: tuple[int, int], found: Cell) -> None:
        """Keep a finished cell; it is durable when this returns. Raises StoreError."""
        files.write_atomic(self._path(cell, "npz"), pack(found))

    def _path(self, cell: tuple[int, int], kind: str) -> Path:
        return self.folder / f"{cell[0]}.{cell[1]}.{kind}"


def drop(claim: FileLock) -> None:
    """Give a claim back, and leave no file."""
    files.remove(claim.path)
    claim.release()


def pack(cell: Cell) -> bytes:
    """A cell as a .npz file without pickles; what is None is left out."""
    arrays = {}
    for field in fields(cell):
        value = getattr(cell, field.name)
        if isinstance(value, dict):
            arrays |= {f"{field.name}.{name}": np.asarray(one) for name, one in value.items()}
        elif value is not None:
            arrays[field.name] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(raw: bytes) -> Cell:
    """What `pack` was given, to the bit. Raises ValueError, KeyError, TypeError, EOFError or zipfile.BadZipFile."""
    found: dict[str, Any] = {}
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        for name, value in arrays.items():
            outer, _, inner = name.partition(".")
            if inner:
                found.setdefault(outer, {})[inner] = value
            else:
                found[name] = value if value.ndim else value.item()
    return Cell(**found)


@contextmanager
def in_progress(out: Path) -> Iterator[Path]:
    """The folder of a grid's finished cells. It goes away when the block has ended well and nobody else is in it; and
    with it, what earlier requests for a grid at the same path had left unfinished.

    Raises StoreError.
    """
    folder = out.with_name(f".{out.name}.cells")
    me = _join(folder)
    try:
        yield folder
    except BaseException:
        _leave(folder, me, keep=any(folder.glob("*/*.npz")))
        raise
    _leave(folder, me, keep=False)


def _join(folder: Path) -> FileLock:
    """Become a member. Under the folder's lock, so that nobody removes it meanwhile."""
    while True:
        files.make_folders(folder / "members")
        try:
            with FileLock(folder / "lock"):
                return FileLock(folder / "members" / secrets.token_hex(8))
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise  # else somebody has just removed the folder


def _leave(folder: Path, me: FileLock, keep: bool) -> None:
    with FileLock(folder / "lock"):
        drop(me)
        if not keep and not any(is_locked(member) for member in (folder / "members").iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
