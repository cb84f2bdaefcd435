"""Compaction: a capture that was written in small shards, written again in large ones, in its place."""

from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.store import files
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.commits import list_commits
from hiddenlake.cache.store.copying import Plan, Progress, choose_rows, copy, plan_select
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.opened import close_all
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.removal import living_writers
from hiddenlake.cache.store.verify import SPOT_CHECK, verify


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did. shards, bytes : of the capture, before and after."""

    samples: int
    shards: tuple[int, int]
    bytes: tuple[int, int]


def plan_compact(path: "str | Path | Backend") -> Plan:
    """What compacting a capture will write. Raises BadInputError for one that is stored with a loss."""
    capture = open_capture(path)
    if capture.codec == "fp8":
        raise BadInputError(
            f"{path} is stored as fp8, and would lose a second time: `hiddenlake select {path} OUT --codec none` copies what "
            f"is there"
        )
    return plan_select(capture)


def compact(
    path: "str | Path | Backend",
    *,
    shard_samples: int | None = None,
    buffer_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> Compacted:
    """Write a capture's samples again, in full shards, verify them, and put them in the capture's place in one step.

    shard_samples : B; the default is what reads are fastest with.

    A compaction that was interrupted goes on where it stopped. Who has the capture open gets an error and opens it again.

    Raises StoreError where a writer is at work, or was meanwhile, and where the capture is not on a local disk;
    BadInputError where there is nothing to gain.
    """
    capture = open_capture(path)
    folder = _local_folder(capture.place)
    before = len(capture.commits), capture.nbytes
    plan = plan_compact(capture.place)
    rows = shard_samples or choose_rows(plan)
    needed = -(-len(capture) // min(rows, max(1, len(capture))))
    if before[0] <= needed and capture.shard_samples >= min(rows, len(capture)):
        raise BadInputError(
            f"{path} has {before[0]} shards of up to {capture.shard_samples} samples: there is nothing to gain"
        )
    _check_quiet(capture.place)
    there = list_commits(capture.place)
    other = LocalBackend(folder.with_name(f".{folder.name}.compacting"))
    copy(plan, other, shard_samples=rows, buffer_bytes=buffer_bytes, progress=progress)
    if SPOT_CHECK in capture.place.list_files(""):
        other.write(SPOT_CHECK, capture.place.read(SPOT_CHECK))
    report = verify(other)
    if not report.ok:
        raise StoreError(f"{other}: {report.problems[0]}: the copy is damaged, and {path} is as it was; check the disk")
    with capture.place.lock():
        if list_commits(capture.place) != there or living_writers(capture.place):
            raise StoreError(f"{path} was written to meanwhile, and is as it was: run the same command again")
        files.exchange(folder, other.path)
    close_all(capture.place)
    files.delete_folder(other.path)
    after = open_capture(path)
    return Compacted(len(after), (before[0], len(after.commits)), (before[1], after.nbytes))


def _local_folder(place: Backend) -> Path:
    if isinstance(place, LocalBackend):
        return place.path
    raise StoreError(
        f"{place} is not a local folder, and cannot be compacted in its place: `hiddenlake select {place} OUT` writes full "
        f"shards into another capture"
    )


def _check_quiet(place: Backend) -> None:
    with place.lock():
        if writers := living_writers(place):
            raise StoreError(f"{place} is being written by {len(writers)} processes: compact it when they are done")
