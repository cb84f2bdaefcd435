"""Commits: what shard k holds, with checksums. They alone decide what exists."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.parallel import each
from hiddenlake.cache.store.signing import check_signed, parse, sign, to_json_bytes

# The checksums of a million chunks, of several sites.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Loss:
    """What a lossy codec lost. Two are added into that of all their rows.

    relative : largest ||row - decoded|| / ||row||, Euclidean, of a row.
    cosine : mean of 1 - cos(row, decoded) over the rows.
    rows : how many were measured: all but absent ones. Without any, the others are 0.
    """

    relative: float = 0.0
    cosine: float = 0.0
    rows: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        rows = self.rows + other.rows
        cosine = (self.cosine * self.rows + other.cosine * other.rows) / max(1, rows)
        return Loss(float(np.maximum(self.relative, other.relative)), cosine, rows)  # a NaN stays one


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksum of one committed file that is read as a whole.

    crc32c : of all but the last four bytes. Most of these files end with their own crc32c, and the crc32c of a text
        and its crc32c is the same number for every text: it would bind a commit to nothing.
    """

    size: int
    crc32c: int

    @classmethod
    def of(cls, data: bytes) -> "FileRecord":
        return cls(len(data), crc32c(data[:-4]))

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "crc32c": self.crc32c}


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One committed file of chunks, which are read one by one. Bytes are little-endian uint32, a chunk each, in file order.

    crcs : crc32c of each chunk as it is stored.  lengths : its bytes, where they differ from chunk to chunk.
    """

    size: int
    crcs: bytes
    lengths: bytes = b""

    def to_json(self) -> dict[str, Any]:
        body = {"size": self.size, "crcs": base64.b64encode(self.crcs).decode()}
        return body | ({"lengths": base64.b64encode(self.lengths).decode()} if self.lengths else {})


Record = FileRecord | ChunkRecord


def _record(body: dict[str, Any]) -> Record:
    size = _whole(body["size"])
    if "crc32c" in body:
        return FileRecord(size, _whole(body["crc32c"]))
    crcs, lengths = (base64.b64decode(body.get(name, ""), validate=True) for name in ("crcs", "lengths"))
    if len(crcs) % 4 or (lengths and len(lengths) != len(crcs)):
        raise ValueError(f"{len(crcs)} bytes of checksums and {len(lengths)} of lengths")
    return ChunkRecord(size, crcs, lengths)


@dataclass(frozen=True, slots=True)
class Commit:
    """One shard that is complete and durable.

    shard : k.  writer, fencing : who committed it, under which claim.
    provenance : engine, versions and hardware of that process.
    keys : (slot,) sample keys, None in a free slot.
    order : (slot,) (index, sample_index) of each sample, None in a free slot: the task's order.
    files : path inside the capture -> size and checksums: of the shard's own files, and of each token shard that its
        samples have tokens in. Commits share token shards, and each vouches for all that it needs.
    time : UTC, ISO 8601.
    spans : (slot,) (start, length) of each sample on the token axis, (-1, 0) where it has no tokens, None in a free
        slot; empty in a capture without tokens.
    token_shards : token shard -> how many of its chunks along the token axis are in its files.
    losses : array -> what its codec lost, for a lossy one; of tokens, over all rows of the token shards.
    replaces : (shard, fencing) of commits that count no longer, since this one is there.
    """

    shard: int
    writer: str
    fencing: int
    provenance: dict[str, Any]
    keys: tuple[str | None, ...]
    order: tuple[tuple[int, int] | None, ...]
    files: dict[str, Record]
    time: str
    spans: tuple[tuple[int, int] | None, ...] = ()
    token_shards: dict[int, int] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    replaces: tuple[tuple[int, int], ...] = ()

    def publish(self, place: Backend) -> None:
        """Make the shard exist, by exclusive creation.

        Raises StoreError when someone else committed this shard.
        """
        if self.create(place):
            return
        found = read_commit(place, self.shard)
        if (found.writer, found.fencing) != (self.writer, self.fencing):
            raise StoreError(
                f"{place}/{commit_file(self.shard)}: shard {self.shard} was already committed by writer {found.writer}, "
                f"not by {self.writer}: these samples were not stored; run the same command again"
            )

    def create(self, place: Backend) -> bool:
        """The same, unless the shard is committed. Returns whether this call did it."""
        body = {
            "shard": self.shard,
            "writer": self.writer,
            "fencing": self.fencing,
            "provenance": self.provenance,
            "keys": list(self.keys),
            "order": [None if pair is None else list(pair) for pair in self.order],
            "files": {name: record.to_json() for name, record in self.files.items()},
            "time": self.time,
        }
        if self.spans:
            body["spans"] = [None if span is None else list(span) for span in self.spans]
            body["token_shards"] = {str(shard): columns for shard, columns in self.token_shards.items()}
        if self.losses:
            body["losses"] = {name: asdict(loss) for name, loss in self.losses.items()}
        if self.replaces:
            body["replaces"] = [list(pair) for pair in self.replaces]
        return place.create(commit_file(self.shard), to_json_bytes(sign(body)))


def list_commits(place: Backend) -> set[int]:
    """Numbers of the committed shards."""
    try:
        names = place.list_files("commits")
    except OSError as error:
        raise trouble(f"{place}/commits", error) from error
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}


def read_commit(place: Backend, shard: int) -> Commit:
    """Read and check one commit. Raises CorruptError, StoreError."""
    file = f"{place}/{commit_file(shard)}"
    try:
        document = parse(place.read(commit_file(shard), _MOST_BYTES))
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON ({error}): {remedy(place, [shard])}") from error
    except OSError as error:
        raise trouble(file, error) from error
    body = check_signed(document, file)
    try:
        commit = Commit(
            _whole(body["shard"]),
            _a(str, body["writer"]),
            _whole(body["fencing"]),
            _a(dict, body["provenance"]),
            tuple(None if key is None else _a(str, key) for key in _a(list, body["keys"])),
            _pairs(body["order"]),
            {name: _record(record) for name, record in body["files"].items()},
            _a(str, body["time"]),
            _pairs(body.get("spans", [])),
            {_whole(int(number)): _whole(columns) for number, columns in body.get("token_shards", {}).items()},
            {name: _loss(loss) for name, loss in body.get("losses", {}).items()},
            _pairs(body.get("replaces", [])),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise CorruptError(f"{file}: not a commit ({error!r}): {remedy(place, [shard])}") from error
    if commit.shard != shard:
        raise CorruptError(f"{file}: it is the commit of shard {commit.shard}: {remedy(place, [shard])}")
    return commit


def read_commits(place: Backend, shards: Iterable[int]) -> dict[int, Commit]:
    """Several commits, by shard, in their order. Raises what `read_commit` does."""
    shards = sorted(shards)
    return dict(zip(shards, each(place, lambda shard: read_commit(place, shard), shards), strict=True))


def valid(commits: Mapping[int, Commit]) -> dict[int, Commit]:
    """Commits that count: those that no other one replaces."""
    replaced = {pair for commit in commits.values() for pair in commit.replaces}
    return {shard: commit for shard, commit in commits.items() if (shard, commit.fencing) not in replaced}


def counting_commits(place: Backend) -> dict[int, Commit]:
    """Those of a capture, by shard. Raises CorruptError, StoreError."""
    return valid(read_commits(place, list_commits(place)))


def commit_file(shard: int) -> str:
    """The file of a shard's commit."""
    return f"commits/{shard}.json"


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:80]!r} is no {kind.__name__}")
    return value


def _whole(value: Any, least: int = 0) -> int:
    """A number that fits into 63 bits."""
    if not least <= _a(int, value) < 1 << 63:
        raise ValueError(f"{str(value)[:80]} is out of range")
    return value


def _pairs(values: list[list[int] | None]) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if pair is None else (_whole(pair[0], -(1 << 63)), _whole(pair[1], 0)) for pair in values)


def _loss(body: dict[str, Any]) -> Loss:
    return Loss(float(body["relative"]), float(body["cosine"]), _whole(body["rows"]))


def remedy(place: Backend, shards: Sequence[int]) -> str:
    """What to do about damage that concerns the commits of these shards."""
    return (
        f"`hiddenlake verify {place}` lists all damage, and `hiddenlake repair {place}` mends what can be mended and gives "
        f"up the rest ({', '.join(map(commit_file, shards))}), so that the same capture command makes it again"
    )


def read_checked(place: Backend, name: str, record: FileRecord, shards: Sequence[int]) -> bytes:
    """A whole small file that the commits of `shards` vouch for with `record`. Raises CorruptError."""
    file = f"{place}/{name}"
    try:
        size = place.size(name)
        # Before anything is allocated: a file may be any size.
        raw = place.read(name) if size == record.size else b""
    except OSError as error:
        raise CorruptError(
            f"{file}: {error.strerror}, but shard {shards[0]} was committed with it "
            f"({record.size} bytes): {remedy(place, shards)}"
        ) from error
    if size != record.size or len(raw) != record.size:
        raise CorruptError(
            f"{file}: {size} bytes, but {record.size} were committed (it ends at byte {size}): {remedy(place, shards)}"
        )
    found = FileRecord.of(raw)
    if found != record:
        raise CorruptError(
            f"{file}: crc32c of bytes 0 to {len(raw) - 4} is {found.crc32c:#010x}, but {record.crc32c:#010x} was "
            f"committed: {remedy(place, shards)}"
        )
    return raw


def read_array(place: Backend, name: str, record: FileRecord, shards: Sequence[int], dtype: str) -> np.ndarray:
    """The numbers of a whole small file that is one Zarr chunk with its crc32c: (n,). Raises CorruptError."""
    raw = read_checked(place, name, record, shards)
    stored = int.from_bytes(raw[-4:], "little")
    if stored != record.crc32c:
        raise CorruptError(f"{place}/{name}: its last four bytes are not its crc32c: {remedy(place, shards)}")
    return np.frombuffer(raw[:-4], dtype)
