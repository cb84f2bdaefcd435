"""Repair: what can be made again from what is intact is made again; what cannot is given up, so that it is captured again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store import claims as _claims
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.checksums import row_checksums
from hiddenlake.cache.store.codecs import decompress
from hiddenlake.cache.store.commits import (
    Commit,
    FileRecord,
    commit_file,
    counting_commits,
    list_commits,
    read_commit,
    read_commits,
    valid,
)
from hiddenlake.cache.store.copying import copy_samples
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.derived import rebuild
from hiddenlake.cache.store.layout import Layout, encode_numbers
from hiddenlake.cache.store.opened import Committed, OpenFile, cell_file, close_all, token_file
from hiddenlake.cache.store.ranges import read_range
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.removal import drop_commit, living_writers
from hiddenlake.cache.store.root import Root, read_root
from hiddenlake.cache.store.shard_file import padded
from hiddenlake.cache.store.sizes import check_buffers
from hiddenlake.cache.store.snapshot import Snapshot, samples_of
from hiddenlake.cache.store.writer import Writer

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Repaired:
    """What a repair did.

    rebuilt : files that were made again, bit for bit.
    moved : samples of damaged shards that were intact, and were written again elsewhere.
    lost : keys of samples that were given up, and shards whose commits were, which do not say any more what they held;
        the same capture command captures them again.
    """

    rebuilt: list[str] = field(default_factory=list)
    moved: int = 0
    lost: list[str] = field(default_factory=list)


def repair(path: "str | Path | Backend", progress: Progress | None = None, buffer_bytes: int = 2 << 30) -> Repaired:
    """Mend a capture. Reads all of it, as `verify` does.

    Made again are metadata, coordinates and per-sample arrays; a shard's index, the checksums between its chunks, and its
    row checksums, where the activations themselves are what was committed. Of a shard that is damaged beyond that, the
    samples whose rows are intact are written again in another one, whose commit replaces the damaged one's.

    Raises StoreError while a writer is at work, or where there is no capture; CorruptError where zarr.json is damaged, which
    says what all the rest means.
    """
    place = open_backend(path)
    root = read_root(place)
    done = Repaired()
    claims = _claims.enter(place, root.layout)
    try:
        with claims.lock():
            if others := set(living_writers(place)) - {claims.writer}:
                raise StoreError(f"{place} is being written by {len(others)} processes: stop them first")
            commits = _readable(place, root.layout, done)
            for name in place.list_files("claims"):
                _drop_bad_claim(claims, f"claims/{name}", done)
        damaged = []
        for number, commit in enumerate(commits.values(), 1):
            if not all([_mend(place, file, done) for file in _files(place, root.layout, commit)]):
                damaged.append(commit.shard)
            elif not _samples_intact(place, root.layout, commit):
                damaged.append(commit.shard)
            if progress is not None:
                progress(number, len(commits))
    finally:
        claims.leave()
    close_all(place)
    # First those of which nothing can be saved: whoever writes reads the tables of all shards that are left.
    for shard in sorted(damaged, key=lambda shard: _samples_intact(place, root.layout, commits[shard])):
        _save(place, root, shard, buffer_bytes, done)
    _finish(place, root, done)
    return done


def _readable(place: Backend, layout: Layout, done: Repaired) -> dict[int, Commit]:
    """The commits that count. One that cannot be read vouches for nothing: its samples are lost."""
    commits = {}
    for shard in sorted(list_commits(place)):
        try:
            commits[shard] = read_commit(place, shard)
        except CorruptError:
            done.lost.append(f"all samples of shard {shard}, whose commit is damaged")
            place.remove(commit_file(shard))
    return valid({shard: commit for shard, commit in commits.items() if commit.files})


def _drop_bad_claim(claims: "_claims.Claims", name: str, done: Repaired) -> None:
    try:
        claims.read(name)
    except CorruptError:
        claims.place.remove(name)
        done.rebuilt.append(name)


def _files(place: Backend, layout: Layout, commit: Commit) -> Iterator[Committed]:
    """The activation files that a commit vouches for."""
    for site in layout.files:
        yield cell_file(place, layout, site, commit)
    for shard in commit.token_shards:
        for site in layout.token_files:
            yield token_file(place, layout, site, shard, (commit,))


def _mend(place: Backend, committed: Committed, done: Repaired) -> bool:
    """Make again what follows from intact chunks. Returns whether the file is now what was committed."""
    try:
        file = OpenFile(committed)
    except CorruptError:
        return False
    shape = committed.shape
    # Rows of chunks that are not in the file have checksums too: of NaN, with which they are filled.
    bits, _, nan = DTYPES[shape.dtype]
    checksums = np.full((len(shape.place), shape.rows), crc32c(np.full(shape.width, nan, bits)), np.uint32)
    intact = same = True
    for place_, number in enumerate(shape.present.tolist()):
        offset, length = int(file.offsets[place_]), int(file.lengths[place_])
        page = np.empty(padded(length), np.uint8)
        try:
            read_range(file, offset, page)
        except CorruptError:
            return False
        data = page[:length]
        if crc32c(data) != int(file.crcs[place_]):
            return False
        tail = int(file.crcs[place_]).to_bytes(4, "little").ljust(len(page) - length, b"\0")
        same &= page[length:].tobytes() == tail
        if not shape.fixed:
            data = np.empty(shape.chunk_bytes, np.uint8)
            decompress(page[:length], data)
        checksums[number] = row_checksums(data.view(shape.stored).reshape(shape.rows, shape.width))
    expected = shape.index(file.lengths)
    index = np.empty(len(expected), np.uint8)
    read_range(file, file.file.size - len(expected), index)
    if not same or index.tobytes() != expected:
        batch = place.batch()
        batch.add(committed.name, _again(file, expected), file.file.size)
        batch.publish()
        done.rebuilt.append(committed.name)
    intact &= _mend_array(place, committed, committed.row_crc, checksums, done)
    if shape.codec == "fp8":
        try:
            file.load(committed.scale, "<f4")
        except CorruptError:
            return False
    return intact


def _again(file: OpenFile, index: bytes) -> Iterator:
    """The bytes of a file whose chunks are intact."""
    for place in range(len(file.offsets)):
        length = int(file.lengths[place])
        data = np.empty(length, np.uint8)
        read_range(file, int(file.offsets[place]), data)
        yield data
        yield int(file.crcs[place]).to_bytes(4, "little").ljust(padded(length) - length, b"\0")
    yield index


def _mend_array(place: Backend, committed: Committed, name: str, values: np.ndarray, done: Repaired) -> bool:
    """Write row checksums again where they are damaged. Returns whether they are what was committed."""
    record = committed.commits[0].files[name]
    try:
        raw = place.read(name)
        if FileRecord.of(raw) == record and raw[-4:] == crc32c(raw[:-4]).to_bytes(4, "little"):
            return True
    except OSError:
        pass
    again = encode_numbers(values.astype("<u4"))
    if FileRecord.of(again) != record:
        return False
    place.write(name, again)
    done.rebuilt.append(name)
    return True


def _samples_intact(place: Backend, layout: Layout, commit: Commit) -> bool:
    name = layout.samples_file(commit.shard)
    try:
        return FileRecord.of(place.read(name)) == commit.files[name]
    except OSError:
        return False


def _save(place: Backend, root: Root, shard: int, buffer_bytes: int, done: Repaired) -> None:
    """Write the intact samples of a damaged shard again, and remove it."""
    commit = read_commit(place, shard)
    snapshot = replace(open_capture(place).snapshot, commits={shard: commit})
    try:
        table = samples_of(snapshot)
        intact = np.array([row for row in range(len(snapshot.keys)) if _reads(snapshot, row)], np.int64)
    except CorruptError:
        table, intact = None, np.empty(0, np.int64)
    if len(intact):
        check_buffers(root.layout, buffer_bytes)
        with Writer(place, root, {"repaired": shard}, replaces=[(shard, commit.fencing)]) as writer:
            for row in intact.tolist():
                done.moved += copy_samples(writer, snapshot, np.array([row]), table.slice(row, 1), single=True)
    done.lost += [key for row, key in enumerate(snapshot.keys.tolist()) if row not in set(intact.tolist())]
    claims = _claims.enter(place, root.layout)
    try:
        with claims.lock():
            every = read_commits(place, list_commits(place))
            others = [other for number, other in valid(every).items() if number != shard]
            drop_commit(root.layout, commit, others, place.remove)
    finally:
        claims.leave()


def _reads(snapshot: Snapshot, row: int) -> bool:
    """Whether every row of a sample is intact."""
    c, rows = snapshot.layout.coverage, np.array([row])
    try:
        for site in c.widths:
            outer = [range(len(c.layers))] if SITES[site].layered else []
            if c.positions:
                snapshot.read_cells(site, [*outer, range(len(c.positions))], rows, "stored", single=True)
            if c.tokens:
                first, stop = snapshot.token_offsets[row], snapshot.token_offsets[row + 1]
                snapshot.read_tokens(site, outer, np.arange(first, stop), "stored", single=True)
    except CorruptError:
        return False
    return True


def _finish(place: Backend, root: Root, done: Repaired) -> None:
    """What repeats commits and samples."""
    claims = _claims.enter(place, root.layout)
    try:
        with claims.lock():
            claims.sweep(lambda: counting_commits(place))
            done.rebuilt += rebuild(place, read_root(place), list(counting_commits(place).values()))
    finally:
        claims.leave()
    close_all(place)
