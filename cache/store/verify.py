"""Verification: every byte of a capture against what was committed, and every rule that the store promises."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.samples import token_checksum
from hiddenlake.cache.store.claims import LOCK
from hiddenlake.cache.store.commits import Commit, list_commits, read_checked, read_commit
from hiddenlake.cache.store.derived import derived_chunks, differs
from hiddenlake.cache.store.files import FileLock, crc32c, write_atomic
from hiddenlake.cache.store.layout import Layout, ShardFile, to_json_bytes
from hiddenlake.cache.store.root import FILE, Root, read_root
from hiddenlake.cache.store.tables import decode, sample_schema

RESULT = "verify.json"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was committed. file : inside the capture. offset : in bytes, None for the whole."""

    file: str
    offset: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.offset is None else f' at byte {self.offset}'}: {self.what}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    shards, samples, bytes : how much was checked.
    problems : everything that is wrong; none means that the capture is what was committed.
    time : UTC, ISO 8601.
    kept : whether the report could be written to verify.json in the capture.
    """

    shards: int
    samples: int
    bytes: int
    problems: tuple[Problem, ...]
    time: str
    kept: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check a whole capture: sizes, checksums, indexes, rows, Parquet, token ids, finiteness, keys, derived arrays.

    progress : called with (shards checked, shards in all).
    Run it while nobody writes: between a commit and its derived arrays, these are reported as missing.

    The report is kept as verify.json in the capture, where that can be written. Raises StoreError where
    there is no capture; damage is reported, not raised.
    """
    path = Path(path)
    try:
        root = read_root(path)
    except CorruptError as error:
        return _keep(path, Report(0, 0, 0, (Problem(FILE, None, str(error)),), _now()))
    problems = list(_check_metadata(path, root))
    commits, damaged = [], 0
    for shard in sorted(list_commits(path)):
        try:
            commits.append(read_commit(path, shard))
        except CorruptError as error:
            damaged += 1
            problems.append(Problem(f"commits/{shard}.json", None, str(error)))
    problems += _check_keys(commits)
    total = len(commits) + damaged
    # Reading and crc32c in C take the time; each thread holds one chunk and one small file.
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for done, found in enumerate(pool.map(lambda c: list(_check_shard(path, root.layout, c)), commits), 1):
            problems += found
            if progress is not None:
                progress(done + damaged, total)
    samples = sum(key is not None for commit in commits for key in commit.keys)
    size = sum(record.size for commit in commits for record in commit.files.values())
    return _keep(path, Report(len(commits), samples, size, tuple(problems), _now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _keep(path: Path, report: Report) -> Report:
    """Write the report into the capture; the report says whether that worked (a capture may be read-only)."""
    kept = Report(report.shards, report.samples, report.bytes, report.problems, report.time, kept=True)
    with suppress(StoreError), FileLock(path / LOCK):
        write_atomic(path / RESULT, to_json_bytes(kept.to_json()))
        return kept
    return report


def _check_metadata(path: Path, root: Root) -> Iterator[Problem]:
    coordinates = root.layout.coordinates()
    for name, data in coordinates.items():
        if differs(path, name, data):
            yield Problem(name, None, "missing, or other values than the coverage names; a writer rebuilds it")
    documents = root.layout.arrays(root.shards)
    for name, expected in documents.items():
        file = f"{name}/{FILE}"
        try:
            found = json.loads((path / file).read_bytes())
        except (OSError, ValueError) as error:
            yield Problem(file, None, f"not readable as JSON ({error}); a writer rebuilds it")
            continue
        # A writer that is growing the sample axis has lengthened the arrays and not yet the root.
        longer = isinstance(found, dict) and found.get("shape", [])
        if found != expected and found not in _lengthened(root, name, longer):
            yield Problem(file, None, "differs from what the coverage means; a writer rebuilds it")


def _lengthened(root: Root, name: str, shape: Any) -> Iterator[dict[str, Any]]:
    axis = _sample_axis(root, name)
    if axis is not None and isinstance(shape, list) and len(shape) > axis and isinstance(shape[axis], int):
        shards = shape[axis] // root.shard_samples
        if shards > root.shards:
            yield root.layout.arrays(shards)[name]


def _sample_axis(root: Root, name: str) -> int | None:
    names = root.layout.arrays(1)[name].get("dimension_names", [])
    return names.index("sample") if "sample" in names else None


def _check_keys(commits: list[Commit]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for commit in commits:
        for key in commit.keys:
            if key is not None and key in seen:
                yield Problem(f"commits/{commit.shard}.json", None, f"sample {key} is in shard {seen[key]} too")
            elif key is not None:
                seen[key] = commit.shard


def _check_shard(path: Path, layout: Layout, commit: Commit) -> Iterator[Problem]:
    expected = set(layout.files_of(commit.shard))
    if set(commit.files) != expected or len(commit.keys) != layout.samples:
        yield Problem(f"commits/{commit.shard}.json", None, f"lists other files or slots than {sorted(expected)}")
        return
    name = layout.samples_file(commit.shard)
    tokens = None
    try:
        table = decode(read_checked(path, commit, name), path / name)
    except CorruptError as error:
        yield Problem(name, None, str(error))
    else:
        problems = list(_check_samples(name, layout, commit, table))
        yield from problems
        if not problems:
            columns = [table[column].to_pylist() for column in ("slot", "key", "token_index", "prompt_length")]
            for derived, data in derived_chunks(layout, commit.shard, *columns).items():
                if differs(path, derived, data):
                    yield Problem(derived, None, "missing, or differs from the committed samples; a writer rebuilds it")
            tokens = np.full((len(layout.coverage.positions), layout.samples), ABSENT, np.int64)
            for slot, index in zip(columns[0], columns[2], strict=True):
                tokens[:, slot] = index
    for site in layout.files:
        yield from _check_data(path, layout, commit, site, tokens)


def _check_samples(name: str, layout: Layout, commit: Commit, table: Any) -> Iterator[Problem]:
    if not table.schema.equals(sample_schema()):
        yield Problem(name, None, f"columns {table.schema.names} differ from the format's")
        return
    committed = [(slot, key, *commit.order[slot]) for slot, key in enumerate(commit.keys) if key is not None]
    rows = table.to_pylist()
    if [(row["slot"], row["key"], row["index"], row["sample_index"]) for row in rows] != committed:
        yield Problem(name, None, "slots, keys or order differ from the commit's")
        return
    for row in rows:
        if row["checksum"] != token_checksum(row["token_ids"]):
            yield Problem(name, None, f"sample {row['key']}: its token ids do not have its checksum")
        if row["total_length"] != len(row["token_ids"]) or not 1 <= row["prompt_length"] <= row["total_length"]:
            yield Problem(name, None, f"sample {row['key']}: its lengths do not fit its token ids")
        try:
            layout.coverage.check_token_index(row["token_index"], row["total_length"])
        except ValueError as error:
            yield Problem(name, None, f"sample {row['key']}: {error}")


def _check_data(path: Path, layout: Layout, commit: Commit, site: str, tokens: np.ndarray | None) -> Iterator[Problem]:
    """One activation file: size, every chunk, every row, the index, and what is NaN."""
    file, name = layout.files[site], layout.data_file(site, commit.shard)
    record = commit.files[name]
    rows = None
    row_name = layout.row_crc_file(site, commit.shard)
    try:
        raw = read_checked(path, commit, row_name)
        rows = np.frombuffer(raw, "<u4", file.chunks * file.samples).reshape(file.chunks, file.samples)
    except CorruptError as error:
        yield Problem(row_name, None, str(error))
    try:
        stream = open(path / name, "rb", buffering=0)
    except OSError as error:
        yield Problem(name, None, f"{error.strerror}, but it was committed with {record.size} bytes")
        return
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if not size == record.size == file.size:
            yield Problem(name, min(size, file.size), f"{size} bytes, but {record.size} were committed")
            return
        page, whole, problems = np.empty(file.pitch, np.uint8), 0, 0
        for chunk in range(file.chunks):
            stream.readinto(page)
            whole = crc32c(page, whole)
            for problem in _check_chunk(name, file, chunk, page, rows, layout, tokens):
                problems += 1
                yield problem
        index = stream.read()
        if index != file.index:
            problems += 1
            yield Problem(name, file.index_offset, "the shard index differs from the layout's")
        if crc32c(index, whole) != record.crc32c and not problems:
            yield Problem(name, None, f"crc32c of the file is not the committed {record.crc32c:#010x}")


def _check_chunk(
    name: str,
    file: ShardFile,
    chunk: int,
    page: np.ndarray,
    rows: np.ndarray | None,
    layout: Layout,
    tokens: np.ndarray | None,
) -> Iterator[Problem]:
    data, offset = page[: file.chunk_bytes], chunk * file.pitch
    stored = int.from_bytes(page[file.chunk_bytes : file.chunk_bytes + 4].tobytes(), "little")
    if crc32c(data) != stored:
        yield Problem(name, offset, f"the chunk has crc32c {crc32c(data):#010x}, but {stored:#010x} was stored")
    if rows is not None:
        row = np.dtype((np.void, file.row_bytes))
        found = np.fromiter(map(google_crc32c.value, data.view(row).tolist()), np.uint32, file.samples)
        for slot in np.flatnonzero(found != rows[chunk]).tolist():
            yield Problem(name, offset + slot * file.row_bytes, f"the row of slot {slot} differs from its row_crc")
    if tokens is not None:
        bits = data.view(file.bits).reshape(file.samples, file.width)
        if file.dtype == "bfloat16":
            finite = (bits & np.uint16(0x7F80)) != 0x7F80
            nan = ~finite & ((bits & np.uint16(0x007F)) != 0)
        else:
            finite, nan = np.isfinite(bits), np.isnan(bits)
        present = tokens[chunk % len(layout.coverage.positions)] != ABSENT
        for slot in np.flatnonzero(np.where(present, ~finite.all(-1), ~nan.all(-1))).tolist():
            what = "is not finite" if present[slot] else "holds values, though its token is absent"
            yield Problem(name, offset + slot * file.row_bytes, f"the row of slot {slot} {what}")
