"""Commits: what shard k holds, with checksums. They alone decide what exists."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store.files import create_exclusive
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
    files : path inside the capture -> size and checksum: of the shard's own files, and of each token shard that its
        samples have tokens in. Commits share token shards, and each vouches for all that it needs.
    time : UTC, ISO 8601.
    spans : (slot,) (start, length) of each sample on the token axis, (-1, 0) where it has no tokens, None in a free
        slot; empty in a capture without tokens.
    token_shards : token shard -> how many of its chunks along the token axis are in its files.
    """

    shard: int
    writer: str
    fencing: int
    provenance: dict[str, Any]
    keys: tuple[str | None, ...]
    order: tuple[tuple[int, int] | None, ...]
    files: dict[str, FileRecord]
    time: str
    spans: tuple[tuple[int, int] | None, ...] = ()
    token_shards: dict[int, int] = field(default_factory=dict)

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
        if self.spans:
            body["spans"] = [None if span is None else list(span) for span in self.spans]
            body["token_shards"] = {str(shard): columns for shard, columns in self.token_shards.items()}
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
        raise CorruptError(f"{file}: not JSON ({error}): {remedy(path, [shard])}") from error
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the commit cannot be read") from error
    body = check_signed(document, str(file))
    if body["shard"] != shard:
        raise CorruptError(f"{file}: it is the commit of shard {body['shard']}: {remedy(path, [shard])}")
    return Commit(
        shard,
        body["writer"],
        body["fencing"],
        body["provenance"],
        tuple(body["keys"]),
        _pairs(body["order"]),
        {name: FileRecord(**record) for name, record in body["files"].items()},
        body["time"],
        _pairs(body.get("spans", [])),
        {int(number): columns for number, columns in body.get("token_shards", {}).items()},
    )


def _pairs(values: list[list[int] | None]) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if pair is None else (pair[0], pair[1]) for pair in values)


def remedy(path: Path, shards: Sequence[int]) -> str:
    """What to do about damage that concerns the commits of these shards."""
    names = ", ".join(str(path / _name(shard)) for shard in shards)
    return (
        f"`hiddenlake verify {path}` lists all damage; delete {names} and run the capture again "
        f"to capture these samples again"
    )


def read_checked(path: Path, name: str, record: FileRecord, shards: Sequence[int]) -> bytes:
    """A whole small file that the commits of `shards` vouch for with `record`. Raises CorruptError."""
    file = path / name
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CorruptError(
            f"{file}: {error.strerror}, but shard {shards[0]} was committed with it "
            f"({record.size} bytes): {remedy(path, shards)}"
        ) from error
    if len(raw) != record.size:
        raise CorruptError(
            f"{file}: {len(raw)} bytes, but {record.size} were committed (it ends at byte {len(raw)}): "
            f"{remedy(path, shards)}"
        )
    if crc32c(raw) != record.crc32c:
        raise CorruptError(
            f"{file}: crc32c of bytes 0 to {len(raw)} is {crc32c(raw):#010x}, but {record.crc32c:#010x} was committed: "
            f"{remedy(path, shards)}"
        )
    return raw
