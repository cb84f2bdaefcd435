"""Files of object storage: positioned reads of one object, and batches of objects that are put."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore


# Of a file that is on its way: what one part of a multipart put holds.
_PIECE_BYTES = 8 << 20


def line_of(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@contextmanager
def reading() -> Iterator[None]:
    """Errors of object storage as the system's."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, f"permission denied ({line_of(error)})") from error
    except BaseError as error:
        raise OSError(errno.EIO, line_of(error)) from error


class ObjectFile:
    """See File. What is read is of the object that was opened, or an error."""

    def __init__(self, store: "ObjectStore", name: str) -> None:
        import obstore

        self._store, self._name = store, name
        with reading():
            found = obstore.head(store, name)
        self.size: int = found["size"]
        self._tag = found["e_tag"]

    def read(self, offset: int, out: np.ndarray) -> None:
        import obstore
        from obstore.exceptions import PreconditionError

        if offset + out.nbytes > self.size:
            raise EOFError(f"the object ends at byte {self.size}")
        if not out.nbytes:
            return  # HTTP knows no empty range
        options = {"range": (offset, offset + out.nbytes), "if_match": self._tag}
        with reading():
            try:
                got = obstore.get(self._store, self._name, options=options).bytes()
            except PreconditionError as error:
                raise OSError(errno.ESTALE, "the object was replaced since it was opened") from error
        if len(got) != out.nbytes:
            raise EOFError(f"{len(got)} of {out.nbytes} bytes came")
        out[:] = np.frombuffer(got, np.uint8)

    def read_cached(self, offset: int, out: np.ndarray) -> bool:
        return False

    def will_need(self, offset: int, length: int) -> None:
        """Reads are made in parallel; there is nothing else to ask for."""

    def mapped(self) -> np.ndarray | None:
        return None

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        """Nothing is held."""


def _pieces(parts: Iterable) -> Iterator[bytes]:
    """A shard's buffer is one part: copied whole, it would take its memory twice."""
    for part in parts:
        data = memoryview(part).cast("B")
        for start in range(0, data.nbytes, _PIECE_BYTES):
            yield bytes(data[start : start + _PIECE_BYTES])


class ObjectBatch:
    """See Batch. An object is durable once it is put; without a commit it is nothing."""

    def __init__(self, put: Callable[[str, Any], Any], remove: Callable[[str], None]) -> None:
        self._put, self._remove = put, remove
        self._names: list[str] = []

    def add(self, name: str, parts: Iterable, size: int | None = None) -> None:
        self._names.append(name)
        self._put(name, _pieces(parts))

    def publish(self) -> None:
        self._names.clear()

    def discard(self) -> None:
        while self._names:
            with suppress(StoreError):
                self._remove(self._names.pop())
