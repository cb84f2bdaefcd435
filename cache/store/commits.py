"""Commits: what shard k holds, with checksums. They alone decide what exists."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store.files import crc32c, create_exclusive
from hiddenlake.cache.store.layout import check_signed, sign, to_json_bytes


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksum of one committed file."""

    size: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One shard that is complete and durable.

    shard : k.  writer, fencing : who committed it, under which claim.
    provenance : engine, versions and hardware of that process.
    keys : (slot,) sample keys, None in a free slot.
    order : (slot,) (index, sample_index) of each sample, None in a free slot: the task's order.
    files : path inside the capture -> size and checksum.
    time : UTC, ISO 8601.
    """

    shard: int
    writer: str
    fencing: int
    provenance: dict[str, Any]
    keys: tuple[str | None, ...]
    order: tuple[tuple[int, int] | None, ...]
    files: dict[str, FileRecord]
    time: str

    def publish(self, path: Path) -> None:
        """Make the shard exist, by exclusive creation.

        Raises StoreError when someone else committed this shard.
        """
        body = {
            "shard": self.shard,
            "writer": self.writer,
            "fencing": self.fencing,
            "provenance": self.provenance,
            "keys": list(self.keys),
            "order": [None if pair is None else list(pair) for pair in self.order],
            "files": {name: {"size": record.size, "crc32c": record.crc32c} for name, record in self.files.items()},
            "time": self.time,
        }
        if create_exclusive(path / _name(self.shard), to_json_bytes(sign(body))):
            return
        found = read_commit(path, self.shard)
        if (found.writer, found.fencing) != (self.writer, self.fencing):
            raise StoreError(
                f"{path / _name(self.shard)}: shard {self.shard} was already committed by writer {found.writer}, "
                f"not by {self.writer}: these samples were not stored; run the same command again"
            )


def _name(shard: int) -> str:
    return f"commits/{shard}.json"


def list_commits(path: Path) -> set[int]:
    """Numbers of the committed shards."""
    try:
        names = os.listdir(path / "commits")
    except OSError as error:
        raise StoreError(f"{path / 'commits'}: {error.strerror}: the capture's commits cannot be read") from error
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}


def read_commit(path: Path, shard: int) -> Commit:
    """Read and check one commit. Raises CorruptError."""
    file = path / _name(shard)
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON ({error}): {remedy(path, shard)}") from error
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the commit cannot be read") from error
    body = check_signed(document, str(file))
    if body["shard"] != shard:
        raise CorruptError(f"{file}: it is the commit of shard {body['shard']}: {remedy(path, shard)}")
    return Commit(
        shard,
        body["writer"],
        body["fencing"],
        body["provenance"],
        tuple(body["keys"]),
        tuple(None if pair is None else (pair[0], pair[1]) for pair in body["order"]),
        {name: FileRecord(**record) for name, record in body["files"].items()},
        body["time"],
    )


def remedy(path: Path, shard: int) -> str:
    """What to do about a damaged shard."""
    return (
        f"`hiddenlake verify {path}` lists all damage; delete {path / _name(shard)} and run the capture again "
        f"to capture this shard's samples again"
    )


def read_checked(path: Path, commit: Commit, name: str) -> bytes:
    """A whole small file that a commit vouches for. Raises CorruptError."""
    file, record = path / name, commit.files[name]
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CorruptError(
            f"{file}: {error.strerror}, but shard {commit.shard} was committed with it "
            f"({record.size} bytes): {remedy(path, commit.shard)}"
        ) from error
    if len(raw) != record.size:
        raise CorruptError(
            f"{file}: {len(raw)} bytes, but {record.size} were committed (it ends at byte {len(raw)}): "
            f"{remedy(path, commit.shard)}"
        )
    if crc32c(raw) != record.crc32c:
        raise CorruptError(
            f"{file}: crc32c of bytes 0 to {len(raw)} is {crc32c(raw):#010x}, but {record.crc32c:#010x} was committed: "
            f"{remedy(path, commit.shard)}"
        )
    return raw
