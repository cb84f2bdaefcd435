"""Claims: who may write which shard, and who works on which samples, among processes that share a capture.

A writer lives as long as it holds the flock on its file in writers/; a process that dies, lets go of it.
All that is decided here is decided under one lock, and only between living writers.
"""

import json
import os
import secrets
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
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
from hiddenlake.cache.store.metadata import arrays

LOCK = "writers/lock"


class Claims:
    """One writer's standing in a capture: its name, its reservations and its claims.

    Methods that say so must be called inside `with claims.lock():`.

    living : writers that lived when the lock was taken. Commits are published without the lock, so whoever reads them
        after this knows all commits of the others, which are dead.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.writer = secrets.token_hex(8)
        self.living: set[str] = set()
        self._file = FileLock(self._writer_file(self.writer))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The capture's one lock, held for as long as deciding takes; never while data is written."""
        with storing(self.path), FileLock(self.path / LOCK):
            self.living = {writer for writer in self._writers() if self._lives(writer)}
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
        for writer in self.living - {self.writer}:
            with suppress(FileNotFoundError):
                for line in self._writer_file(writer).read_text().splitlines():
                    reserved.update(json.loads(line))
        return reserved

    def reserve(self, keys: list[str]) -> None:
        """Tell the other writers. Under the lock."""
        self._file.append(json.dumps(keys).encode() + b"\n")

    def read(self, claim: str) -> tuple[str, int] | None:
        """(writer, fencing) of a claim (`sample_claim`, `token_claim`), or None."""
        file = self.path / claim
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
        """Claim the lowest sample shard that nobody committed and no living writer holds. Under the lock.

        Returns (shard, fencing number).
        """
        committed = list_commits(self.path)
        shard = next(k for k in count() if k not in committed and not self._held(sample_claim(k)))
        return shard, self._take(sample_claim(shard), self.layout.files_of(shard) + self._derived(shard))

    def claim_tokens(self, first: int | None, shards: int, committed: Container[int]) -> dict[int, int]:
        """Claim neighbouring token shards that no commit vouches for and no living writer holds. Under the lock.

        first : the lowest of them, or None for the first run that is free.
        committed : token shards that the capture's commits, read under the same lock, vouch for.

        Returns shard -> fencing number; empty where `first` was given and some of them are not free.
        """

        def free(shard: int) -> bool:
            return shard not in committed and not self._held(token_claim(shard))

        if first is None:
            first, run = 0, 0
            for shard in count():
                first, run = (first, run + 1) if free(shard) else (shard + 1, 0)
                if run == shards:
                    break
        elif not all(map(free, range(first, first + shards))):
            return {}
        return {
            shard: self._take(token_claim(shard), self.layout.token_files_of(shard))
            for shard in range(first, first + shards)
        }

    def _held(self, claim: str) -> bool:
        held = self.read(claim)
        return held is not None and held[0] in self.living

    def _take(self, claim: str, files: list[str]) -> int:
        """Take a claim that is free, removing the files that a dead writer left. Returns its fencing number."""
        held, file = self.read(claim), self.path / claim
        fencing = 1 if held is None else held[1] + 1
        document = to_json_bytes({"writer": self.writer, "fencing": fencing})
        if held is None:
            if not create_exclusive(file, document):
                raise StoreError(
                    f"{file} appeared while this process held the capture's lock, so the file system does not honour "
                    f"flock: put the capture on a local file system, or run one writer at a time"
                )
        else:
            for name in files:
                remove(self.path / name)
            write_atomic(file, document)
        return fencing

    def _derived(self, shard: int) -> list[str]:
        return list(self.layout.derived_files(shard).values())

    def sweep(self, committed: Container[int]) -> None:
        """Remove what dead writers left: unfinished files, and shards without a commit. Under the lock.

        committed : token shards that the capture's commits, read under the same lock, vouch for.

        What a living writer holds is never touched. Claims stay: the next to claim counts their fencing up.
        """
        commits = list_commits(self.path)
        held = cache(self._held)
        for folder in self._folders():
            for name in os.listdir(self.path / folder):
                final = final_name(name)
                claim, there = self._claim_of(folder, final or name, commits, committed)
                if final is None:
                    left = claim is not None and not there and not held(claim)
                elif folder == "failures":
                    left = final.partition(".")[0] not in self.living
                else:
                    # Without a claim it is metadata or itself a claim, which is written under the lock only.
                    left = claim is None or not held(claim)
                if left:
                    remove(self.path / folder / name)
        for writer in self._writers() - self.living:
            remove(self._writer_file(writer))

    def _claim_of(
        self, folder: str, name: str, commits: Container[int], committed: Container[int]
    ) -> tuple[str | None, bool]:
        """(the claim that a file is written under, whether its shard was committed), or (None, False)."""
        file = f"{folder}/{name}"
        if folder == "commits":
            shard = int(name[:-5]) if name[:-5].isdigit() else None
        elif (shard := self.layout.token_shard_of(file)) is not None:
            return token_claim(shard), shard in committed
        else:
            shard = self.layout.shard_of(file)
        return (None, False) if shard is None else (sample_claim(shard), shard in commits)

    def _folders(self) -> Iterator[str]:
        yield from ("", "claims", "commits", "failures", "samples", "writers")
        for name in arrays(self.layout, 1, 1):
            if (self.path / name).is_dir():
                yield name


def sample_claim(shard: int) -> str:
    """The file that says who may write a sample shard."""
    return f"claims/{shard}"


def token_claim(shard: int) -> str:
    """The file that says who may write a token shard."""
    return f"claims/tokens.{shard}"


def enter(path: Path, layout: Layout) -> Claims:
    """Become a writer of a capture."""
    # Under the lock, so that nobody sees the file before it is locked and takes its writer for dead.
    with storing(path), FileLock(path / LOCK):
        return Claims(path, layout)
