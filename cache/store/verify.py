"""Verification: every byte of a capture against what was committed, and every rule that the store promises."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.samples import token_checksum
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.checks import ANYTHING, FINITE, NAN, Problem, check_file
from hiddenlake.cache.store.claims import read_claim
from hiddenlake.cache.store.commit_rules import problems_of
from hiddenlake.cache.store.commits import Commit, list_commits, read_checked, read_commit, valid
from hiddenlake.cache.store.derived import cells_of, derived_chunks, differs
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.metadata import arrays
from hiddenlake.cache.store.opened import cell_file, token_file
from hiddenlake.cache.store.root import FILE, Root, read_root
from hiddenlake.cache.store.signing import check_signed, parse, sign, to_json_bytes
from hiddenlake.cache.store.tables import MOST_LOOSE_BYTES, check_rows, decode, decode_loose, sample_schema

RESULT = "verify.json"
SPOT_CHECK = "spot_check.json"

# Of a result, which lists all damage.
_MOST_BYTES = 16 << 20

# Of one array's metadata.
_MOST_BYTES = 1 << 20


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


def verify(path: str | Path | Backend, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check a whole capture: sizes, checksums, indexes, rows, Parquet, token ids, finiteness, keys, spans, and what is
    derived from them.

    progress : called with (shards checked, shards in all), token shards counted too.
    Run it while nobody writes: between a commit and its derived arrays, these are reported as missing.

    The report is kept as verify.json in the capture, where that can be written. Raises StoreError where
    there is no capture; damage is reported, not raised.
    """
    place = open_backend(path)
    try:
        root = read_root(place)
    except CorruptError as error:
        return _keep(place, Report(0, 0, 0, (Problem(FILE, None, str(error)),), _now()))
    problems = list(_check_metadata(place, root))
    commits, damaged = [], 0
    for shard in sorted(list_commits(place)):
        try:
            commit = read_commit(place, shard)
            if found := list(problems_of(root.layout, commit)):
                damaged += 1
                problems += [Problem(f"commits/{shard}.json", None, what) for what in found]
            else:
                commits.append(commit)
        except CorruptError as error:
            damaged += 1
            problems.append(Problem(f"commits/{shard}.json", None, str(error)))
    layout = root.layout
    counting = valid({commit.shard: commit for commit in commits})
    commits = list(counting.values())
    problems += _check_loose(place)
    problems += _check_keys(commits)
    problems += _check_spans(layout, commits)
    checks = [partial(_check_shard, place, layout, commit) for commit in commits]
    for shard in sorted({shard for commit in commits for shard in commit.token_shards}):
        checks.append(partial(_check_token_shard, place, layout, shard, commits))
    total = len(checks) + damaged
    # Reading and crc32c in C take the time; each thread holds one chunk and one small file.
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for done, found in enumerate(pool.map(lambda check: list(check()), checks), 1):
            problems += found
            if progress is not None:
                progress(done + damaged, total)
    samples = sum(key is not None for commit in commits for key in commit.keys)
    size = sum({name: record.size for commit in commits for name, record in commit.files.items()}.values())
    return _keep(place, Report(len(commits), samples, size, tuple(problems), _now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _keep(place: Backend, report: Report) -> Report:
    """Write the report into the capture; the report says whether that worked (a capture may be read-only)."""
    kept = Report(report.shards, report.samples, report.bytes, report.problems, report.time, kept=True)
    with suppress(StoreError), place.lock():
        place.write(RESULT, to_json_bytes(sign(parse(to_json_bytes(kept.to_json())))))
        return kept
    return report


def kept_report(place: Backend) -> dict[str, Any] | None:
    """What the last verification found, as it was kept; None where there was none. Raises CorruptError, StoreError."""
    file = f"{place}/{RESULT}"
    try:
        document = parse(place.read(RESULT, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise trouble(file, error) from error
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON ({error}): run `hiddenlake verify {place}` again") from error
    try:
        return check_signed(document, file)
    except CorruptError as error:
        raise CorruptError(f"{file}: it is damaged: run `hiddenlake verify {place}` again") from error


def _check_metadata(place: Backend, root: Root) -> Iterator[Problem]:
    coordinates = root.layout.coordinates()
    for name, data in coordinates.items():
        if differs(place, name, data):
            yield Problem(name, None, "missing, or other values than the coverage names; a writer rebuilds it")
    documents = arrays(root.layout, root.shards, root.token_shards)
    for name, expected in documents.items():
        file = f"{name}/{FILE}"
        try:
            found = parse(place.read(file, _MOST_BYTES))
        except (OSError, ValueError) as error:
            yield Problem(file, None, f"not readable as JSON ({error}); a writer rebuilds it")
            continue
        # A writer that is growing the sample axis has lengthened the arrays and not yet the root.
        longer = isinstance(found, dict) and found.get("shape", [])
        if found != expected and found not in _lengthened(root, name, longer):
            yield Problem(file, None, "differs from what the coverage means; a writer rebuilds it")


def _check_loose(place: Backend) -> Iterator[Problem]:
    """What no commit vouches for: claims, and the tables of failures and labels."""
    names: dict[str, list[str]] = {}
    for folder in ("claims", "failures", "labels"):
        try:
            names[folder] = sorted(place.list_files(folder))
        except OSError as error:
            yield Problem(folder, None, str(error.strerror))
    for name in names.get("claims", ()):
        if place.final_name(name) is None:
            try:
                read_claim(place, f"claims/{name}")
            except CorruptError as error:
                yield Problem(f"claims/{name}", None, str(error))
    for folder in ("failures", "labels"):
        for name in names.get(folder, ()):
            if name.endswith(".parquet") and not name.startswith("."):
                file = f"{folder}/{name}"
                try:
                    decode_loose(place.read(file, MOST_LOOSE_BYTES), f"{place}/{file}")
                except FileNotFoundError:
                    continue  # a writer that is gone by now
                except (OSError, CorruptError) as error:
                    yield Problem(file, None, str(error))


def _lengthened(root: Root, name: str, shape: Any) -> Iterator[dict[str, Any]]:
    """The document of an array whose sample axis, or token axis, is as long as `shape` says and longer than planned."""
    axes = arrays(root.layout, 1, 1)[name].get("dimension_names", [])
    for axis, rows in (("sample", root.layout.samples), ("token", root.layout.shard_tokens)):
        at = axes.index(axis) if axis in axes else None
        if at is not None and isinstance(shape, list) and len(shape) > at and isinstance(shape[at], int):
            lengths = {"sample": root.shards, "token": root.token_shards}
            if shape[at] // rows > lengths[axis]:
                lengths[axis] = shape[at] // rows
                yield arrays(root.layout, lengths["sample"], lengths["token"])[name]


def _check_keys(commits: list[Commit]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for commit in commits:
        for key in commit.keys:
            if key is not None and key in seen:
                yield Problem(f"commits/{commit.shard}.json", None, f"sample {key} is in shard {seen[key]} too")
            elif key is not None:
                seen[key] = commit.shard


def _check_spans(layout: Layout, commits: list[Commit]) -> Iterator[Problem]:
    """Where the samples' tokens lie, and that commits that share a token shard say the same of it."""
    T, K = layout.chunk_tokens, layout.shard_tokens
    used: dict[int, np.ndarray] = {}
    first: dict[int, Commit] = {}
    for commit in commits:
        name = f"commits/{commit.shard}.json"
        for shard in commit.token_shards:
            other = first.setdefault(shard, commit)
            if _of_token_shard(layout, other, shard) != _of_token_shard(layout, commit, shard):
                yield Problem(name, None, f"differs from commits/{other.shard}.json on token shard {shard}")
        for key, span in zip(commit.keys, commit.spans, strict=False):
            start, length = span or (-1, 0)
            for shard in layout.token_shards_of(start, length) if start >= 0 else ():
                rows = slice(max(0, start - shard * K), start + length - shard * K)
                there = used.setdefault(shard, np.zeros(K, bool))
                if there[rows].any():
                    yield Problem(
                        name, None, f"sample {key}: its tokens overlap another sample's in token shard {shard}"
                    )
                there[rows] = True
                if min(rows.stop, K) > T * commit.token_shards.get(shard, 0):
                    yield Problem(name, None, f"sample {key}: token shard {shard} lacks some of its tokens")


def _of_token_shard(layout: Layout, commit: Commit, shard: int) -> tuple[Any, ...]:
    return commit.token_shards[shard], *(commit.files.get(name) for name in layout.token_files_of(shard))


def _check_token_shard(place: Backend, layout: Layout, shard: int, commits: list[Commit]) -> Iterator[Problem]:
    vouching = [commit for commit in commits if shard in commit.token_shards]
    if set(layout.token_files_of(shard)) - vouching[0].files.keys():
        return  # reported with its commit
    K = layout.shard_tokens
    expected = np.full(K, ANYTHING)
    for commit in vouching:
        for start, length in filter(None, commit.spans):
            expected[max(0, start - shard * K) : max(0, start + length - shard * K)] = FINITE
    by_column = expected.reshape(-1, layout.chunk_tokens)
    for site in layout.token_files:
        committed = token_file(place, layout, site, shard, tuple(vouching))
        yield from check_file(committed, lambda chunk: by_column[chunk % len(by_column)])


def _check_shard(place: Backend, layout: Layout, commit: Commit) -> Iterator[Problem]:
    if not commit.files and not any(commit.keys):
        return  # given up by a writer that was taken for dead
    name = layout.samples_file(commit.shard)
    rows = np.full((len(layout.coverage.positions), layout.samples), ANYTHING)
    try:
        table = decode(read_checked(place, name, commit.files[name], [commit.shard]), f"{place}/{name}")
    except CorruptError as error:
        yield Problem(name, None, str(error))
    else:
        problems = list(_check_samples(name, layout, commit, table))
        yield from problems
        if not problems:
            cells = cells_of(table)
            for derived, data in derived_chunks(layout, commit, cells).items():
                if differs(place, derived, data):
                    yield Problem(derived, None, "missing, or differs from the committed samples; a writer rebuilds it")
            rows[:] = NAN
            for slot, (index, _) in cells.items():
                rows[:, slot] = np.where(np.array(index, np.int64) != ABSENT, FINITE, NAN)
    for site in layout.files:
        yield from check_file(cell_file(place, layout, site, commit), lambda chunk: rows[chunk % len(rows)])


def _check_samples(name: str, layout: Layout, commit: Commit, table: Any) -> Iterator[Problem]:
    if [(field.name, field.type) for field in table.schema] != [(f.name, f.type) for f in sample_schema()]:
        yield Problem(name, None, f"columns {table.schema.names} differ from the format's")
        return
    try:
        check_rows(table, layout)
    except ValueError as error:
        yield Problem(name, None, str(error))
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
            length = commit.spans[row["slot"]][1] if commit.spans else 0
            complete = row["status"] == "complete"
            layout.coverage.check_tokens(length, row["prompt_length"], row["total_length"], complete)
        except ValueError as error:
            yield Problem(name, None, f"sample {row['key']}: {error}")
