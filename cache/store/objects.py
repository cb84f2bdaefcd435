"""Object storage as a backend: S3, and what speaks its protocol, through obstore.

A put is atomic and durable, and may be made on a condition: that the object is not there, or that it is still what was
read (its ETag). Nothing else is needed: the one lock is an object that is replaced on that condition, and a writer lives as
long as its heartbeat is young, by the server's clock. Both can be lost by a process that stands still, so that neither
decides what exists: commits do (see claims.py).
"""

import json
import random
import secrets
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.files import check_size, trouble
from hiddenlake.cache.store.object_files import ObjectBatch, ObjectFile, line_of, reading

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# A request takes 20 to 100 ms: reads in flight that fill a 10 Gbit/s line with chunks of a quarter of a megabyte.
_PARALLEL = 48

_BEAT_SECONDS = 5.0

# Without a heartbeat for so long, a writer is taken for dead: far longer than a request takes with its retries.
_LEASE_SECONDS = 60.0

# A lock that nobody renews for so long is taken: a process died that held it.
_LOCK_SECONDS = 15.0

_LOCK = "writers/lock"


class ObjectBackend:
    """See Backend. url : s3://bucket/folder; credentials, region and endpoint as for the AWS tools (AWS_* variables)."""

    exact = False
    parallel = _PARALLEL

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store = _store(self.url)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"ObjectBackend({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectBackend) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectBackend, (self.url,)

    def child(self, name: str) -> "ObjectBackend":
        return ObjectBackend(f"{self.url}/{name}")

    def free_bytes(self) -> None:
        return None

    def list_folders(self) -> list[str]:
        with reading():
            return [str(prefix).rsplit("/", 1)[-1] for prefix in self._listed("")["common_prefixes"]]

    def generation(self) -> Hashable:
        """Always the same: what is read of another capture in this place differs from what the commits say."""
        return self.url

    def read(self, name: str, most: int | None = None) -> bytes:
        import obstore

        with reading():
            found = obstore.get(self._store, name)
            check_size(found.meta["size"], most)
            return bytes(found.bytes())

    def open(self, name: str) -> "ObjectFile":
        return ObjectFile(self._store, name)

    def list_files(self, folder: str) -> list[str]:
        with reading():
            return [entry["path"].rsplit("/", 1)[-1] for entry in self._listed(folder)["objects"]]

    def _listed(self, folder: str) -> Any:
        import obstore

        return obstore.list_with_delimiter(self._store, folder or None)

    def size(self, name: str) -> int:
        return self._head(name)["size"]

    def _head(self, name: str) -> Any:
        import obstore

        with reading():
            return obstore.head(self._store, name)

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        self._put(name, data)

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        return self._put_if(name, data, "create") is not None

    def settle(self, name: str) -> None:
        """An object is durable once it is there."""

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        import obstore

        with self._writing(name):
            found = obstore.get(self._store, name)
            tag = {"e_tag": found.meta["e_tag"]}
            same = bytes(found.bytes()) == old
        return same and self._put_if(name, new, tag) is not None

    def _put(self, name: str, data: Any) -> Any:
        import obstore

        with self._writing(name):
            try:
                return obstore.put(self._store, name, data)
            except FileNotFoundError:
                raise self._no_bucket() from None

    def _no_bucket(self) -> StoreError:
        return StoreError(f"{self.url}: there is no such bucket: make it, or name another one")

    def _put_if(self, name: str, data: bytes, mode: Any, only_ours: bool = False) -> Any:
        """What the put returned, or None where the condition did not hold.

        An answer may be lost, and not the request. So after an error it is looked whether the data is there.
        only_ours : nobody else puts this data. Then the same after a condition that did not hold, for the client tries
            again by itself where the server says that it failed.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        def there() -> Any:
            with suppress(BaseError, FileNotFoundError):
                found = obstore.get(self._store, name)
                return found.meta if bytes(found.bytes()) == data else None

        with self._writing(name):
            try:
                return obstore.put(self._store, name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return there() if only_ours else None
            except FileNotFoundError:
                if mode == "create":
                    raise self._no_bucket() from None
                return None
            except BaseError:
                found = there()
                if found is None:
                    raise
                return found

    def remove(self, name: str) -> None:
        import obstore

        with self._writing(name), suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def batch(self) -> "ObjectBatch":
        return ObjectBatch(self._put, self.remove)

    def make(self, contents: dict[str, bytes], folders: Sequence[str]) -> bool:
        import obstore

        with self._writing(""):
            for page in obstore.list(self._store, chunk_size=10):
                if any(not entry["path"].startswith("writers/") for entry in page):
                    return False
        # The root first: it says who was faster. A writer makes the others again where they are missing.
        (root,) = (name for name in contents if name == "zarr.json")
        if not self.create(root, contents[root]):
            return False
        for name, data in contents.items():
            if name != root:
                self.write(name, data)
        return True

    def delete(self) -> None:
        import obstore

        self.remove("zarr.json")
        with self._writing(""):
            for page in obstore.list(self._store, chunk_size=500):
                obstore.delete(self._store, [entry["path"] for entry in page])

    def final_name(self, name: str) -> str | None:
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        with _locks(self.url), _Lock(self):
            yield

    def join(self, writer: str) -> "ObjectMember":
        return ObjectMember(self, writer)

    def writers(self) -> list[str]:
        with self._writing("writers"):
            names = {name.partition(".")[0] for name in self.list_files("writers")}
        return sorted(names - {_LOCK.rpartition("/")[2]})

    def lives(self, writer: str) -> bool:
        try:
            beat: datetime = self._head(f"writers/{writer}.json")["last_modified"]
            # Written when the lock was taken, which was just now, by the same clock.
            now: datetime = self._head(_LOCK)["last_modified"]
        except FileNotFoundError:
            return False
        return (now - beat).total_seconds() < _LEASE_SECONDS

    def appended(self, writer: str) -> list[bytes]:
        found = []
        for name in self.list_files("writers"):
            if name.startswith(f"{writer}.") and name.endswith(".keys"):
                with suppress(FileNotFoundError):
                    found.append(self.read(f"writers/{name}"))
        return found

    def expel(self, writer: str) -> None:
        # One that has appended nothing is told by this from one that is forgotten.
        self.write(f"writers/{writer}.expelled", b"")
        self.remove(f"writers/{writer}.json")

    def forget(self, writer: str) -> None:
        # The heartbeat first: by it, the writer knows.
        self.remove(f"writers/{writer}.json")
        for name in self.list_files("writers"):
            if name.startswith(f"{writer}."):
                self.remove(f"writers/{name}")

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            with reading():
                yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise trouble(f"{self.url}/{name}", error) from error


def _store(url: str) -> "ObjectStore":
    try:
        from obstore.store import S3Store, from_url
    except ImportError as error:
        raise StoreError(f"{url} needs obstore, which is not installed: pip install 'hiddenlake[s3]'") from error
    from obstore.exceptions import BaseError

    scheme, _, path = url.partition("://")
    bucket, _, prefix = path.partition("/")
    try:
        if scheme == "s3" and bucket:
            # Not from the URL, in which some characters that a name may have would mean other things.
            return S3Store(bucket, prefix=prefix or None)
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise StoreError(f"{url} cannot be opened ({line_of(error)}): expected s3://bucket/folder") from error


class ObjectMember:
    """See Member: an object that is written again and again."""

    def __init__(self, backend: ObjectBackend, writer: str) -> None:
        self._backend, self._writer = backend, writer
        self._name = f"writers/{writer}.json"
        self._appended = 0
        self._left = threading.Event()
        backend.write(self._name, b"{}")
        self._heart = threading.Thread(target=self._beat, name="hiddenlake-heartbeat", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._left.wait(_BEAT_SECONDS):
            # One that is gone stays gone: the others have taken this writer for dead.
            with suppress(StoreError, OSError):
                tag = self._backend._head(self._name)["e_tag"]
                beat = json.dumps({"beat": secrets.token_hex(4)}).encode()
                self._backend._put_if(self._name, beat, {"e_tag": tag}, only_ours=True)

    def append(self, data: bytes) -> None:
        self._backend.write(f"writers/{self._writer}.{self._appended}.keys", data)
        self._appended += 1

    def check(self) -> None:
        try:
            self._backend._head(self._name)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self._backend}: this writer stood still for so long that others have taken it for dead: what it did not "
                f"commit is not stored; run the same command again"
            ) from error
        except OSError as error:
            raise trouble(f"{self._backend}/{self._name}", error) from error

    def leave(self) -> None:
        self._left.set()
        self._heart.join()
        self._backend.forget(self._writer)


class _Lock:
    """The capture's lock, as an object that says who holds it; replaced only by who knows its last state."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend, self._owner, self._tag = backend, secrets.token_hex(8), None
        self._released = threading.Event()

    def __enter__(self) -> None:
        seen, since = None, time.monotonic()
        while True:
            owner, tag = self._look()
            if tag != seen:
                seen, since = tag, time.monotonic()
            if owner is None or time.monotonic() - since > _LOCK_SECONDS:
                if self._take("create" if tag is None else {"e_tag": tag}):
                    break
            else:
                time.sleep(random.uniform(0.02, 0.2))
        self._renewal = threading.Thread(target=self._renew, name="hiddenlake-lock", daemon=True)
        self._renewal.start()

    def _look(self) -> tuple[str | None, str | None]:
        """(who holds it, its ETag)."""
        import obstore

        with self._backend._writing(_LOCK):
            try:
                found = obstore.get(self._backend._store, _LOCK)
                return json.loads(bytes(found.bytes()))["owner"], found.meta["e_tag"]
            except FileNotFoundError:
                return None, None

    def _take(self, mode: Any, owner: bool = True) -> bool:
        # The number makes each state another object, with another ETag.
        document = {"owner": self._owner if owner else None, "number": secrets.token_hex(8)}
        done = self._backend._put_if(_LOCK, json.dumps(document).encode(), mode, only_ours=True)
        if done is not None:
            self._tag = done["e_tag"]
        return done is not None

    def _renew(self) -> None:
        while not self._released.wait(_LOCK_SECONDS / 3):
            with suppress(StoreError):
                self._take({"e_tag": self._tag})

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._renewal.join()
        # If another has taken it meanwhile, it stays theirs.
        self._take({"e_tag": self._tag}, owner=False)


_guard = threading.Lock()
_by_url: dict[str, threading.Lock] = {}


def _locks(url: str) -> threading.Lock:
    """Threads of one process wait for each other here, and not at the server."""
    with _guard:
        return _by_url.setdefault(url, threading.Lock())
