"""Claims: who may write which shard, and who works on which samples, among processes that share a capture.

A writer lives as long as it holds the flock on its file in writers/; a process that dies, lets go of it.
All that is decided here is decided under one lock, and only between living writers.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store.commits import list_commits
from hiddenlake.cache.store.files import (
    FileLock,
    create_exclusive,
    final_name,
    is_locked,
    remove,
    storing,
    write_atomic,
)
from hiddenlake.cache.store.layout import Layout, to_json_bytes

LOCK = "writers/lock"


class Claims:
    """One writer's standing in a capture: its name, its reservations and its claims.

    Methods that say so must be called inside `with claims.lock():`.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.writer = secrets.token_hex(8)
        self._file = FileLock(self._writer_file(self.writer))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The capture's one lock, held for as long as deciding takes; never while data is written."""
        with storing(self.path), FileLock(self.path / LOCK):
            yield

    def leave(self) -> None:
        """Let go of everything. Reservations and uncommitted claims no longer count."""
        remove(self._file.path)
        self._file.release()

    def _writer_file(self, writer: str) -> Path:
        return self.path / "writers" / f"{writer}.jsonl"

    def _lives(self, writer: str) -> bool:
        if writer == self.writer:
            return True
        try:
            return is_locked(self._writer_file(writer))
        except FileNotFoundError:
            return False

    def _writers(self) -> set[str]:
        return {name[:-6] for name in os.listdir(self.path / "writers") if name.endswith(".jsonl")}

    def reserved_by_others(self) -> set[str]:
        """Keys that other living writers work on. Under the lock."""
        reserved: set[str] = set()
        for writer in self._writers() - {self.writer}:
            with suppress(FileNotFoundError):
                if self._lives(writer):
                    for line in self._writer_file(writer).read_text().splitlines():
                        reserved.update(json.loads(line))
        return reserved

    def reserve(self, keys: list[str]) -> None:
        """Tell the other writers. Under the lock."""
        self._file.append(json.dumps(keys).encode() + b"\n")

    def read(self, shard: int) -> tuple[str, int] | None:
        """(writer, fencing) of a shard's claim, or None."""
        file = self.path / "claims" / str(shard)
        try:
            document = json.loads(file.read_bytes())
            return document["writer"], document["fencing"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{file}: not a claim ({error!r}): stop all writers of this capture, delete the file, "
                f"and run the same command again"
            ) from error

    def claim(self) -> tuple[int, int]:
        """Claim the lowest shard that nobody committed and no living writer holds. Under the lock.

        Returns (shard, fencing number).
        """
        committed = list_commits(self.path)
        shard = 0
        while True:
            if shard not in committed:
                held = self.read(shard)
                if held is None or not self._lives(held[0]):
                    break
            shard += 1
        fencing = 1 if held is None else held[1] + 1
        file = self.path / "claims" / str(shard)
        document = to_json_bytes({"writer": self.writer, "fencing": fencing})
        if held is None:
            if not create_exclusive(file, document):
                raise StoreError(
                    f"{file} appeared while this process held the capture's lock, so the file system does not honour "
                    f"flock: put the capture on a local file system, or run one writer at a time"
                )
        else:
            self._remove_shard(shard)
            write_atomic(file, document)
        return shard, fencing

    def _remove_shard(self, shard: int) -> None:
        """Remove what a dead writer left of a shard that it did not commit."""
        for name in (*self.layout.files_of(shard), *self.layout.derived_files(shard).values()):
            remove(self.path / name)

    def sweep(self) -> None:
        """Remove what dead writers left: unfinished files, and shards without a commit. Under the lock.

        What a living writer holds is never touched. Claims stay: the next to claim counts their fencing up.
        """
        committed = list_commits(self.path)
        lives: dict[int, bool] = {}

        def held(shard: int) -> bool:
            if shard not in lives:
                claim = self.read(shard)
                lives[shard] = claim is not None and self._lives(claim[0])
            return lives[shard]

        for folder in self._folders():
            for name in os.listdir(self.path / folder):
                final = final_name(name)
                shard = self._shard(folder, final or name)
                if final is None:
                    left = shard is not None and shard not in committed and not held(shard)
                elif folder == "failures":
                    left = not self._lives(final.partition(".")[0])
                else:
                    # Without a shard it is metadata or a claim, which is written under the lock only.
                    left = shard is None or not held(shard)
                if left:
                    remove(self.path / folder / name)
        for writer in self._writers():
            if not self._lives(writer):
                remove(self._writer_file(writer))

    def _folders(self) -> Iterator[str]:
        yield from ("", "claims", "commits", "failures", "samples", "writers")
        for name in self.layout.arrays(1):
            if (self.path / name).is_dir():
                yield name

    def _shard(self, folder: str, name: str) -> int | None:
        if folder == "commits":
            return int(name[:-5]) if name[:-5].isdigit() else None
        return self.layout.shard_of(f"{folder}/{name}")


def enter(path: Path, layout: Layout) -> Claims:
    """Become a writer of a capture."""
    # Under the lock, so that nobody sees the file before it is locked and takes its writer for dead.
    with storing(path), FileLock(path / LOCK):
        return Claims(path, layout)
