"""Removing: whole captures, and what nobody needs any more of captures and lakes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store import claims as _claims
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.catalog import captures_of
from hiddenlake.cache.store.commits import Commit, commit_file, counting_commits, list_commits, read_commits, valid
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.local import LocalBackend, left_folders
from hiddenlake.cache.store.opened import close_all
from hiddenlake.cache.store.root import has_root, read_root


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file, or a folder, that nobody needs. path : as a user writes it. bytes : what it takes."""

    path: str
    bytes: int


def living_writers(place: Backend) -> list[str]:
    """Writers that work on a capture now. Under its lock."""
    return [writer for writer in place.writers() if place.lives(writer)]


def remove_capture(path: "str | Path | Backend") -> None:
    """Remove a capture. Who has it open gets errors from then on, and never another capture's activations.

    Raises StoreError where there is none, or a writer is at work on it.
    """
    place = open_backend(path)
    if not has_root(place):
        raise StoreError(f"{place} is no capture: it has no zarr.json; `hiddenlake ls` lists the captures")
    with place.lock():
        if writers := living_writers(place):
            raise StoreError(f"{place} is being written by {len(writers)} processes: stop them first")
        # Under the lock, so that nobody begins to write meanwhile.
        place.delete()
    close_all(place)


def collect_garbage(path: "str | Path | Backend", dry: bool = False) -> list[Leftover]:
    """Remove what dead processes left in a lake, or in one capture: unfinished files, shards without a commit or whose
    commit was replaced, folders that were being made or removed. Nothing that a living process holds.

    dry : only say what would be removed.

    Returns what was removed. Raises StoreError where there is no such folder.
    """
    place = open_backend(path)
    found: list[Leftover] = []
    if isinstance(place, LocalBackend):
        found += [Leftover(str(folder), size) for folder, size in left_folders(place.path, remove=not dry)]
    for capture in captures_of(place):
        with suppress(FileNotFoundError):
            found += _collect(capture, dry)
    return found


def _collect(place: Backend, dry: bool) -> list[Leftover]:
    found: list[Leftover] = []

    def remove(name: str) -> None:
        with suppress(FileNotFoundError):
            found.append(Leftover(f"{place}/{name}", place.size(name)))
        if not dry:
            place.remove(name)

    root = read_root(place)
    claims = _claims.enter(place, root.layout)
    try:
        with claims.lock():
            commits = read_commits(place, list_commits(place))
            counting = valid(commits)
            for shard in sorted(commits.keys() - counting.keys()):
                drop_commit(root.layout, commits[shard], list(counting.values()), remove)
            claims.sweep(lambda: counting_commits(place), remove, forget=not dry)
    finally:
        claims.leave()
    return found


def drop_commit(layout: Layout, commit: Commit, others: list[Commit], remove: Callable[[str], None]) -> None:
    """Remove a commit, then the files that only it vouched for. Under the lock.

    others : every other commit that counts.
    """
    remove(commit_file(commit.shard))
    kept = {name for other in others for name in other.files}
    for name in (*commit.files, *layout.derived_files(commit.shard).values()):
        if name not in kept:
            remove(name)
