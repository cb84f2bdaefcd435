"""Snapshots: what was committed to a capture at one moment, and how its activations are read by number."""

import hashlib
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.codecs import result_dtype
from hiddenlake.cache.store.commits import Commit, read_checked, remedy
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.extents import Extent
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.moment import Dtype, Moment
from hiddenlake.cache.store.opened import (
    Committed,
    cell_file,
    check_size,
    close_all,
    find_open,
    most_open,
    open_committed,
    token_file,
)
from hiddenlake.cache.store.parallel import each
from hiddenlake.cache.store.ranges import Part, cells_of, in_order, read_parts
from hiddenlake.cache.store.root import Root
from hiddenlake.cache.store.shard_file import ShardFile
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS, check_rows, decode, sample_schema

if TYPE_CHECKING:
    import pyarrow
    import torch

_FIRST = np.zeros(1, np.int64)

# Of one extent on average: what lies in shorter pieces is copied faster than it is listed.
_EXTENT_BYTES = 64 << 10


@dataclass(frozen=True, eq=False)
class Snapshot(Moment):
    """What was committed at one moment. Later commits do not change it, so lazy arrays may hold on to it.

    generation : of the folder, as the backend tells it.
    keys : (sample,) sample keys in task order: by (index, sample_index).
    shard, slot : (sample,) where each sample lies.
    token_start, token_length : (sample,) where its tokens lie on the token axis; -1 and 0 where it has none.
    """

    place: Backend
    generation: Hashable
    root: Root
    commits: dict[int, Commit]
    keys: np.ndarray = field(init=False)
    shard: np.ndarray = field(init=False)
    slot: np.ndarray = field(init=False)
    token_start: np.ndarray = field(init=False)
    token_length: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows = sorted(
            (*commit.order[slot], key, commit.shard, slot)
            for commit in self.commits.values()
            for slot, key in enumerate(commit.keys)
            if key is not None
        )
        spans = [(self.commits[row[3]].spans or {row[4]: None})[row[4]] or (-1, 0) for row in rows]
        object.__setattr__(self, "keys", np.array([row[2] for row in rows], dtype=object))
        object.__setattr__(self, "shard", np.array([row[3] for row in rows], dtype=np.int64))
        object.__setattr__(self, "slot", np.array([row[4] for row in rows], dtype=np.int64))
        object.__setattr__(self, "token_start", np.array([span[0] for span in spans], dtype=np.int64))
        object.__setattr__(self, "token_length", np.array([span[1] for span in spans], dtype=np.int64))

    @property
    def layout(self) -> Layout:
        return self.root.layout

    @property
    def identity(self) -> dict[str, Any]:
        return self.root.identity

    @property
    def coverage(self) -> Coverage:
        return self.root.coverage

    def samples(self, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pyarrow.Table":
        return samples_of(self, columns)

    @cached_property
    def name(self) -> str:
        """Names what is there: the same samples in the same order, of the same bytes."""
        return digest([[commit.shard, commit.writer, commit.fencing] for commit in self.commits.values()])

    def commit_name(self, shard: int) -> str:
        """Names what a shard holds: a writer's id is its own, and shards that are committed again have another fencing."""
        commit = self.commits[shard]
        return f"{shard}-{commit.writer}-{commit.fencing}"

    def commits_name(self, rows: np.ndarray) -> str:
        """Names the commits that hold some samples; see `commits_name`."""
        return commits_name(map(self.commit_name, np.unique(self.shard[rows]).tolist()))

    @cached_property
    def token_places(self) -> np.ndarray:
        """(token,) place on the token axis of each committed token in task order."""
        shift = np.repeat(self.token_start - self.token_offsets[:-1], self.token_length)
        return shift + np.arange(self.token_offsets[-1])

    @cached_property
    def _token_commits(self) -> dict[int, tuple[Commit, ...]]:
        """The commits that vouch for each token shard."""
        found: dict[int, list[Commit]] = {}
        for commit in self.commits.values():
            for shard in commit.token_shards:
                found.setdefault(shard, []).append(commit)
        return {shard: tuple(commits) for shard, commits in found.items()}

    @cached_property
    def _every(self) -> list[tuple[int, np.ndarray, np.ndarray, bool]]:
        """See `_by_shard`: of all samples."""
        return list(self._group(np.arange(len(self.keys))))

    def _by_shard(self, rows: np.ndarray) -> Iterable[tuple[int, np.ndarray, np.ndarray, bool]]:
        """(shard, slots, places in the result, whether these are all slots in their order) of samples."""
        if len(rows) == 1:
            return [(int(self.shard[rows[0]]), self.slot[rows], _FIRST, self.layout.samples == 1)]
        return self._every if self._are_all(rows) else self._group(rows)

    def _are_all(self, rows: np.ndarray) -> bool:
        """Whether these are all samples, in their order."""
        return 0 < len(rows) == len(self.keys) and rows[0] == 0 and bool((rows[1:] > rows[:-1]).all())

    def _group(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, bool]]:
        shards = self.shard[rows]
        order = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for into in np.split(order, edges[1:]) if len(order) else ():
            slots = self.slot[rows[into]]
            yield int(shards[into[0]]), slots, into, in_order(slots, into, self.layout.samples)

    def _cell_file(self, site: str, shard: int) -> Committed:
        found = self._cell_files.get((site, shard))
        if found is None:
            found = self._cell_files[site, shard] = cell_file(self.place, self.layout, site, self.commits[shard])
        return found

    @cached_property
    def _cell_files(self) -> dict[tuple[str, int], Committed]:
        return {}

    def read_cells(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        outer = [np.asarray(axis, np.int64) for axis in outer]
        reads = self._cell_reads(site, outer, rows)
        return self._read(reads, outer, len(rows), self.layout.files[site], dtype, check, out, single)

    def _cell_reads(
        self, site: str, outer: Sequence[np.ndarray], rows: np.ndarray
    ) -> list[tuple[Committed, list[Part]]]:
        # Sample shards hold all their chunks: a chunk's number is its place.
        places = cells_of(outer, self.layout.files[site].outer)
        cells = np.arange(len(places))
        return [
            (self._cell_file(site, shard), [Part(places, cells, slots, into, whole)])
            for shard, slots, into, whole in self._by_shard(rows)
        ]

    def cell_extents(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, only_open: bool = False
    ) -> list[Extent] | None:
        """Where the bytes lie, unchecked, that `read_cells` reads as stored, in their order.

        None where they are not found as they are in few pieces of local files; if `only_open`, of files that are open.
        Raises as `read_cells` does.
        """
        file = self.layout.files[site]
        if file.codec != "none" or not len(rows):
            return None
        runs = self._runs_of_all if self._are_all(rows) else self._runs(rows)
        if len(rows) * file.row_bytes < _EXTENT_BYTES * len(runs):
            return None
        self.check_there()
        found = []
        for shard, slot, count in runs:
            committed = self._cell_file(site, shard)
            opened = find_open(committed) if only_open else open_committed(committed)
            if opened is None or opened.file.fileno() is None:
                return None
            found.append((opened.file, opened.offsets, slot * file.row_bytes, count * file.row_bytes))
        places = cells_of([np.asarray(axis, np.int64) for axis in outer], file.outer).tolist()
        return [
            Extent(file, offsets.item(place) + first, length)
            for place in places
            for file, offsets, first, length in found
        ]

    @cached_property
    def _runs_of_all(self) -> list[tuple[int, int, int]]:
        return self._runs(np.arange(len(self.keys)))

    def _runs(self, rows: np.ndarray) -> list[tuple[int, int, int]]:
        """(shard, first slot, how many) of samples that lie behind one another."""
        shards, slots = self.shard[rows], self.slot[rows]
        starts = np.flatnonzero((np.diff(shards, prepend=-1) != 0) | (np.diff(slots, prepend=-1) != 1))
        counts = np.diff(starts, append=len(rows))
        return list(zip(shards[starts].tolist(), slots[starts].tolist(), counts.tolist(), strict=True))

    def read_tokens(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        layout = self.layout
        full = layout.token_files[site]
        layers = np.asarray(outer[0] if outer else [0], np.int64)
        # One part for each chunk along the token axis, one file for each shard.
        places = self.token_places[rows]
        order = np.argsort(places, kind="stable")
        columns, slots = np.divmod(places[order], layout.chunk_tokens)
        edges = [0, *(np.flatnonzero(np.diff(columns)) + 1).tolist(), len(rows)] if len(rows) else [0]
        files: dict[int, Committed] = {}
        parts: dict[int, list[Part]] = {}
        for start, stop in itertools.pairwise(edges):
            shard, column = divmod(int(columns[start]), full.outer[-1])
            if shard not in files:
                files[shard] = self._token_file(site, shard)
            chunks = files[shard].shape.place[layers * full.outer[-1] + column]
            if (chunks < 0).any():
                raise self._disagree(files[shard])
            some, into = slots[start:stop], order[start:stop]
            part = Part(chunks, np.arange(len(layers)), some, into, in_order(some, into, layout.chunk_tokens))
            parts.setdefault(shard, []).append(part)
        reads = [(files[shard], found) for shard, found in parts.items()]
        return self._read(reads, [np.asarray(axis) for axis in outer], len(rows), full, dtype, check, out, single)

    def send_cells(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, check: bool, device: str
    ) -> "torch.Tensor":
        import torch

        from hiddenlake.cache.store import direct
        from hiddenlake.cache.store.device import Staging

        staging = Staging(device)
        file = self.layout.files[site]
        if not check and staging.device.type == "cuda" and direct.available():
            reads = self._cell_reads(site, [np.asarray(axis, np.int64) for axis in outer], rows)
            if direct.can_read(reads):
                self.check_there()
                shape = (*map(len, outer), len(rows), file.width)
                sent = torch.empty(shape, dtype=getattr(torch, file.dtype), device=staging.device)
                direct.read(reads, sent.view(-1, len(rows), file.width))
                return sent.float() if dtype == "float32" else sent
        return super().send_cells(site, outer, rows, dtype, check, device)

    def fingerprint(self, site: str) -> str:
        bytes_of = hashlib.sha256()
        for shard, commit in sorted(self.commits.items()):
            for name in self.layout.cell_names(site, shard):
                if name in commit.files:  # a shard that was given up has none, and only fp8 has scales
                    bytes_of.update(digest([name, commit.files[name].to_json()]).encode())
        return bytes_of.hexdigest()

    def _token_file(self, site: str, shard: int) -> Committed:
        first, *others = commits = self._token_commits[shard]
        committed = token_file(self.place, self.layout, site, shard, commits)
        for commit in others:
            names = self.layout.token_names(site, shard)
            same = all(commit.files.get(name) == first.files.get(name) for name in names)
            if not same or commit.token_shards[shard] != first.token_shards[shard]:
                raise self._disagree(committed)
        return committed

    @staticmethod
    def _disagree(committed: Committed) -> CorruptError:
        return CorruptError(
            f"{committed}: the commits of the shards {committed.shards} differ in what they say of it, or it lacks "
            f"tokens that they hold: {committed.remedy}"
        )

    def _read(
        self,
        reads: Sequence[tuple[Committed, list[Part]]],
        outer: Sequence[np.ndarray],
        rows: int,
        file: ShardFile,
        dtype: Dtype,
        check: bool,
        out: np.ndarray | None,
        single: bool,
    ) -> np.ndarray:
        shape = (*map(len, outer), rows, file.width)
        cells = math.prod(map(len, outer))
        kind = result_dtype(file, dtype)
        if out is not None and (out.shape != shape or out.dtype != kind or not out.flags.c_contiguous):
            raise ValueError(
                f"out is {out.dtype} {out.shape}{'' if out.flags.c_contiguous else ', not contiguous'}: expected "
                f"{kind} {shape}, C-contiguous"
            )
        self.check_there()
        most = most_open()
        for start in range(0, len(reads), most) or (0,):
            # Opened before memory is taken, so that sizes that lie are found out first.
            opened = [(open_committed(committed), parts) for committed, parts in reads[start : start + most]]
            if out is None:
                for committed, _ in reads[start + most :]:
                    check_size(committed)
                out = np.empty(shape, kind)
            read_parts(opened, out.reshape(cells, rows, file.width), dtype, check, single)
        return out

    def check_there(self) -> None:
        """Raise StoreError when the capture was removed, or another one lies in its place."""
        try:
            same = self.place.generation() == self.generation
        except FileNotFoundError:
            same = False
        if not same:
            close_all(self.place)  # what is removed takes room as long as it is open
            raise StoreError(
                f"{self.place} was removed or replaced since it was opened: open the capture that is there now"
            )


def commits_name(names: Iterable[str]) -> str:
    """One name for several commits, each given once or more, in any order."""
    return digest(sorted(set(names)))


def samples_of(
    snapshot: Snapshot, columns: Sequence[str] = SAMPLE_COLUMNS, rows: np.ndarray | None = None
) -> "pyarrow.Table":
    """Rows of samples/ in task order. rows : only these; other shards than theirs are not read."""
    import pyarrow as pa

    columns = list(columns) if "slot" in columns else ["slot", *columns]
    # In captures that were made when nothing could be neither right nor wrong, `correct` is never null.
    schema = pa.schema([sample_schema().field(name) for name in columns])
    tables, slots, shards = [schema.empty_table()], [], []
    # A commit without files was given up by a writer that was taken for dead.
    commits = [commit for commit in snapshot.commits.values() if commit.files]
    if rows is not None:
        needed = set(snapshot.shard[rows].tolist())
        commits = [commit for commit in commits if commit.shard in needed]
    names = [snapshot.layout.samples_file(commit.shard) for commit in commits]

    def read(number: int) -> bytes:
        commit, name = commits[number], names[number]
        return read_checked(snapshot.place, name, commit.files[name], [commit.shard])

    for commit, name, raw in zip(commits, names, each(snapshot.place, read, range(len(commits))), strict=True):
        shard = commit.shard
        table = decode(raw, f"{snapshot.place}/{name}", columns)
        try:
            tables.append(table.cast(schema))
            check_rows(table, snapshot.layout)
        except (pa.ArrowException, ValueError) as error:
            raise CorruptError(f"{snapshot.place}/{name}: {error}: {remedy(snapshot.place, [shard])}") from error
        slots += table["slot"].to_pylist()
        shards += [shard] * table.num_rows
    chosen = slice(None) if rows is None else rows
    row_of = {(shard, slot): row for row, (shard, slot) in enumerate(zip(shards, slots, strict=True))}
    try:
        order = [row_of[at] for at in zip(snapshot.shard[chosen].tolist(), snapshot.slot[chosen].tolist(), strict=True)]
    except KeyError as error:
        shard, slot = error.args[0]
        raise CorruptError(
            f"{snapshot.place}/{snapshot.layout.samples_file(shard)}: no row for slot {slot}, which was committed: "
            f"{remedy(snapshot.place, [shard])}"
        ) from error
    return pa.concat_tables(tables).take(pa.array(order, pa.int64()))
