"""Snapshots: what was committed to a capture at one moment, and how its activations are read by number."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.commits import Commit, read_checked, remedy
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.ranges import FileRead, Part, read_files
from hiddenlake.cache.store.root import Root
from hiddenlake.cache.store.shard_file import ShardFile
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS, decode, sample_schema

if TYPE_CHECKING:
    import pyarrow

Dtype = Literal["stored", "float32"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was committed at one moment. Later commits do not change it, so lazy arrays may hold on to it.

    keys : (sample,) sample keys in task order: by (index, sample_index).
    shard, slot : (sample,) where each sample lies.
    token_start, token_length : (sample,) where its tokens lie on the token axis; -1 and 0 where it has none.
    """

    path: Path
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

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def token_offsets(self) -> np.ndarray:
        """(sample + 1,) where each sample's tokens start among all committed tokens in task order."""
        return np.concatenate([[0], np.cumsum(self.token_length)])

    @cached_property
    def token_places(self) -> np.ndarray:
        """(token,) place on the token axis of each committed token in task order."""
        shift = np.repeat(self.token_start - self.token_offsets[:-1], self.token_length)
        return shift + np.arange(self.token_offsets[-1])

    @cached_property
    def token_index(self) -> np.ndarray:
        """(token,) int32, index into its sample's prompt + answer, of each committed token in task order."""
        tokens = self.layout.coverage.tokens
        first = np.zeros(len(self.keys), np.int64)
        if tokens.part == "all_generated":
            first = samples_of(self, ["prompt_length"])["prompt_length"].to_numpy()
        number = np.arange(self.token_offsets[-1]) - np.repeat(self.token_offsets[:-1], self.token_length)
        return (np.repeat(first, self.token_length) + tokens.every * number).astype(np.int32)

    @cached_property
    def _token_commits(self) -> dict[int, tuple[Commit, ...]]:
        """The commits that vouch for each token shard."""
        found: dict[int, list[Commit]] = {}
        for commit in self.commits.values():
            for shard in commit.token_shards:
                found.setdefault(shard, []).append(commit)
        return {shard: tuple(commits) for shard, commits in found.items()}

    def read_cells(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, check: bool = True
    ) -> np.ndarray:
        """Cells by number along each axis.

        outer : indices along layer and position (position alone for a site without layers), any order, repeats allowed.
        rows : (sample,) rows in task order.

        Returns (*outer, sample, width): ml_dtypes.bfloat16 or float32. Raises CorruptError.
        """
        layout = self.layout
        file = layout.files[site]
        places = np.ndindex(*(len(axis) for axis in outer))
        numbers = np.meshgrid(*(np.asarray(axis, np.int64) for axis in outer), indexing="ij")
        cells = list(zip(places, np.ravel_multi_index(numbers, file.outer).ravel().tolist(), strict=True))
        shards = self.shard[rows]
        reads = []
        for shard in dict.fromkeys(shards.tolist()):
            into = np.flatnonzero(shards == shard)
            names = layout.data_file(site, shard), layout.row_crc_file(site, shard)
            part = Part(cells, self.slot[rows[into]], into)
            reads.append(FileRead(self.path, *names, file, (self.commits[shard],), [part]))
        return self._read(reads, outer, rows, file, dtype, check)

    def read_tokens(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, check: bool = True
    ) -> np.ndarray:
        """Token-level activations by number along each axis.

        outer : indices along layer, () for a site without layers; any order, repeats allowed.
        rows : (token,) among all committed tokens in task order.

        Returns (*outer, token, width): ml_dtypes.bfloat16 or float32. Raises CorruptError.
        """
        layout = self.layout
        full = layout.token_files[site]
        layers = [((place,), layer) for place, layer in enumerate(outer[0])] if outer else [((), 0)]
        # One part for each chunk along the token axis, one read for each shard.
        places = self.token_places[rows]
        order = np.argsort(places, kind="stable")
        columns, slots = np.divmod(places[order], layout.chunk_tokens)
        edges = [0, *(np.flatnonzero(np.diff(columns)) + 1).tolist(), len(rows)] if len(rows) else [0]
        parts: dict[int, list[Part]] = {}
        for start, stop in itertools.pairwise(edges):
            shard, column = divmod(int(columns[start]), full.outer[-1])
            cells = [(place, layer * full.outer[-1] + column) for place, layer in layers]
            parts.setdefault(shard, []).append(Part(cells, slots[start:stop], order[start:stop]))
        reads = []
        for shard, found in parts.items():
            commits = self._token_commits[shard]
            file = replace(full, columns=commits[0].token_shards[shard])
            names = layout.token_data_file(site, shard), layout.token_row_crc_file(site, shard)
            read = FileRead(self.path, *names, file, commits, found)
            there = set(file.present.tolist())
            if any(
                [commit.files[name] for name in names] != [read.record(name) for name in names] for commit in commits
            ) or not all(chunk in there for part in found for _, chunk in part.cells):
                raise CorruptError(
                    f"{read.file}: the commits of the shards {read.shards} differ in what they say of it, or it lacks "
                    f"tokens that they hold: {remedy(self.path, read.shards)}"
                )
            reads.append(read)
        return self._read(reads, outer, rows, full, dtype, check)

    def _read(
        self,
        reads: Sequence[FileRead],
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        file: ShardFile,
        dtype: Dtype,
        check: bool,
    ) -> np.ndarray:
        out = np.empty((*(len(axis) for axis in outer), len(rows), file.width), file.bits)
        read_files(reads, out, check)
        if dtype == "stored":
            return out.view(DTYPES[file.dtype][1])
        return out if out.dtype == np.float32 else widen(out)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, exactly. bits : uint16, any shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def samples_of(snapshot: Snapshot, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pyarrow.Table":
    """Rows of samples/ in task order."""
    import pyarrow as pa

    columns = list(columns) if "slot" in columns else ["slot", *columns]
    # In captures that were made when nothing could be neither right nor wrong, `correct` is never null.
    schema = pa.schema([sample_schema().field(name) for name in columns])
    tables, slots, shards = [schema.empty_table()], [], []
    for shard, commit in snapshot.commits.items():
        name = snapshot.layout.samples_file(shard)
        raw = read_checked(snapshot.path, name, commit.files[name], [shard])
        table = decode(raw, snapshot.path / name, columns)
        tables.append(table.cast(schema))
        slots += table["slot"].to_pylist()
        shards += [shard] * table.num_rows
    row_of = {(shard, slot): row for row, (shard, slot) in enumerate(zip(shards, slots, strict=True))}
    try:
        order = [row_of[at] for at in zip(snapshot.shard.tolist(), snapshot.slot.tolist(), strict=True)]
    except KeyError as error:
        shard, slot = error.args[0]
        raise CorruptError(
            f"{snapshot.path / snapshot.layout.samples_file(shard)}: no row for slot {slot}, which was committed: "
            f"{remedy(snapshot.path, [shard])}"
        ) from error
    return pa.concat_tables(tables).take(pa.array(order, pa.int64()))
