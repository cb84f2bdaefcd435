"""Reading a capture: checked byte ranges of committed shards, and nothing that was not committed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hiddenlake.cache.errors import CorruptError, StoreError, UnknownNameError
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.commits import Commit, list_commits, read_checked, read_commit, remedy
from hiddenlake.cache.store.coverage import DTYPES, Coverage
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.ranges import ShardRead, read_shards
from hiddenlake.cache.store.root import Root, read_root
from hiddenlake.cache.store.tables import decode, failure_schema, sample_schema

if TYPE_CHECKING:
    import pyarrow
    import xarray

Dtype = Literal["stored", "float32"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was committed at one moment. Later commits do not change it, so lazy arrays may hold on to it.

    keys : (sample,) sample keys in task order: by (index, sample_index).
    shard, slot : (sample,) where each sample lies.
    """

    path: Path
    root: Root
    commits: dict[int, Commit]
    keys: np.ndarray = field(init=False)
    shard: np.ndarray = field(init=False)
    slot: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows = sorted(
            (*commit.order[slot], key, commit.shard, slot)
            for commit in self.commits.values()
            for slot, key in enumerate(commit.keys)
            if key is not None
        )
        object.__setattr__(self, "keys", np.array([row[2] for row in rows], dtype=object))
        object.__setattr__(self, "shard", np.array([row[3] for row in rows], dtype=np.int64))
        object.__setattr__(self, "slot", np.array([row[4] for row in rows], dtype=np.int64))

    @cached_property
    def layout(self) -> Layout:
        return self.root.layout

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def read_block(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, check: bool = True
    ) -> np.ndarray:
        """Cells by number along each axis.

        outer : indices along layer and position (position alone for a site without layers), any order, repeats allowed.
        rows : (sample,) rows in task order.

        Returns (*outer, sample, width): ml_dtypes.bfloat16 or float32. Raises CorruptError.
        """
        file = self.layout.files[site]
        out = np.empty((*(len(axis) for axis in outer), len(rows), file.width), file.bits)
        shards = self.shard[rows]
        reads = []
        for shard in dict.fromkeys(shards.tolist()):
            into = np.flatnonzero(shards == shard)
            reads.append(ShardRead(self.path, self.layout, self.commits[shard], site, self.slot[rows[into]], into))
        read_shards(reads, outer, out, check)
        if dtype == "stored":
            return out.view(DTYPES[file.dtype][1])
        return out if out.dtype == np.float32 else widen(out)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, exactly. bits : uint16, any shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


class Capture:
    """One capture, open for reading; made by `open_capture`. It shows what was committed when opened or refreshed.

    May be used from several threads. Importing this needs neither torch nor zarr.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshot = Snapshot(path, read_root(path), {})
        self.refresh()

    def __repr__(self) -> str:
        c = self.coverage
        return (
            f"<hiddenlake capture {self.path}: {len(self)} samples, {len(c.layers)} layers, "
            f"{len(c.positions)} positions, sites {', '.join(c.sites)}, {c.dtype}>"
        )

    def __len__(self) -> int:
        return len(self.snapshot.keys)

    def refresh(self) -> None:
        """Show what was committed since."""
        known = self.snapshot.commits
        numbers = list_commits(self.path)
        commits = {k: known[k] if k in known else read_commit(self.path, k) for k in sorted(numbers)}
        # The fields are replaced together, so that a thread that reads meanwhile sees one moment.
        self.snapshot = Snapshot(self.path, self.snapshot.root, commits)

    @property
    def identity(self) -> dict[str, Any]:
        """The value identity, as its writer gave it."""
        return self.snapshot.root.identity

    @property
    def coverage(self) -> Coverage:
        return self.snapshot.root.coverage

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the process that made the capture."""
        return self.snapshot.root.provenance

    @property
    def commits(self) -> list[Commit]:
        """By shard; each has the provenance of the process that wrote it."""
        return list(self.snapshot.commits.values())

    @property
    def shard_samples(self) -> int:
        """B."""
        return self.snapshot.root.shard_samples

    @property
    def planned(self) -> int:
        """Samples that were planned when the capture was made."""
        return self.snapshot.root.planned

    @property
    def keys(self) -> list[str]:
        """Keys of the committed samples in task order: by (index, sample_index)."""
        return self.snapshot.keys.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of all committed files."""
        return sum(record.size for commit in self.commits for record in commit.files.values())

    def samples(self) -> "pyarrow.Table":
        """All committed samples in task order, with the columns of `tables.SAMPLE_COLUMNS`. Raises CorruptError."""
        return samples_of(self.snapshot)

    def failures(self) -> "pyarrow.Table":
        """Samples that could not be captured and are not committed: key, index, cause, attempts, time; the last try."""
        import pyarrow as pa

        latest: dict[str, dict[str, Any]] = {}
        for file in sorted((self.path / "failures").glob("[!.]*.parquet")):
            for row in decode(_read(file), file).to_pylist():
                if row["key"] not in latest or row["time"] > latest[row["key"]]["time"]:
                    latest[row["key"]] = row
        committed = self.snapshot.row_of
        rows = sorted((row for key, row in latest.items() if key not in committed), key=lambda row: row["index"])
        return pa.Table.from_pylist(rows, schema=failure_schema())

    def labels(self) -> dict[str, "pyarrow.Table"]:
        """Tables of labels that were added later, by name: a column `key`, and values."""
        found = {}
        for file in sorted((self.path / "labels").glob("[!.]*.parquet")):
            table = decode(_read(file), file)
            if "key" not in table.column_names:
                raise CorruptError(f"{file}: columns {table.column_names}, but labels need `key`: write the file again")
            found[file.stem] = table
        return found

    def read(
        self,
        site: str,
        layer: int | Iterable[int] | None = None,
        position: str | int | Iterable[str | int] | None = None,
        samples: str | int | Iterable[str | int] | None = None,
        dtype: Dtype = "stored",
        check: bool = True,
    ) -> np.ndarray:
        """Activations, checked against their checksums.

        site : a site of the coverage, or `embed`.
        layer : block index, or several, or None for all.
        position : name, or several, or None for all.
        samples : key, or row in task order, or several of either, or None for all.
        dtype : `stored` for what is on disk (ml_dtypes.bfloat16 or float32), `float32` for it widened exactly.
        check : False skips the checksums, for measurements only.

        Returns (layer, position, sample, width), (position, sample, width) for a site without layers; a single layer,
        position or sample loses its axis. A cell whose token is absent is NaN.

        Raises UnknownNameError for what was not captured, naming what was; CorruptError where the bytes are
        not those that were committed.
        """
        snapshot = self.snapshot
        c = snapshot.root.coverage
        if site not in snapshot.layout.files:
            raise UnknownNameError(f"{self.path} has no site {site!r}: it has {', '.join(snapshot.layout.files)}")
        if dtype not in ("stored", "float32"):
            raise UnknownNameError(f"unknown dtype {dtype!r}: expected `stored` or `float32`")
        positions, one_position = _select(
            "position", position, {name: i for i, name in enumerate(c.positions)}, self.path
        )
        outer, squeeze = [positions], [one_position]
        if SITES[site].layered:
            layers, one_layer = _select("layer", layer, {k: i for i, k in enumerate(c.layers)}, self.path)
            outer, squeeze = [layers, positions], [one_layer, one_position]
        elif layer is not None:
            raise UnknownNameError(f"site {site!r} has no layers, but layer {layer!r} was asked for: leave it out")
        rows, one_sample = self._rows(snapshot, samples)
        block = snapshot.read_block(site, outer, rows, dtype, check)
        return block[tuple(0 if one else slice(None) for one in (*squeeze, one_sample))]

    def _rows(self, snapshot: Snapshot, samples: Any) -> tuple[np.ndarray, bool]:
        count = len(snapshot.keys)
        if samples is None:
            return np.arange(count), False
        one = isinstance(samples, str) or not isinstance(samples, Iterable)
        rows = []
        for sample in [samples] if one else samples:
            row = snapshot.row_of.get(sample, -1) if isinstance(sample, str) else sample
            row = int(row) if isinstance(row, (int, np.integer)) else -1
            if not 0 <= row < count:
                raise UnknownNameError(
                    f"{self.path} has no sample {sample!r}: it has {count} samples, numbered in task order from 0, "
                    f"{'and no key yet' if not count else f'with keys like {snapshot.keys[0]!r}'}"
                )
            rows.append(row)
        return np.array(rows, dtype=np.int64), one

    def dataset(self, dtype: Dtype = "float32") -> "xarray.Dataset":
        """The capture as a lazy xarray.Dataset; see `view.dataset`."""
        from hiddenlake.cache.store.view import dataset

        return dataset(self, dtype)


def open_capture(path: str | Path) -> Capture:
    """Open a capture for reading.

    Raises StoreError where there is none or one of an unknown version, CorruptError where its metadata
    or a commit is damaged.
    """
    return Capture(Path(path))


def samples_of(snapshot: Snapshot) -> "pyarrow.Table":
    """Rows of samples/ in task order."""
    import pyarrow as pa

    tables, slots, shards = [sample_schema().empty_table()], [], []
    for shard, commit in snapshot.commits.items():
        name = snapshot.layout.samples_file(shard)
        table = decode(read_checked(snapshot.path, commit, name), snapshot.path / name)
        tables.append(table)
        slots += table["slot"].to_pylist()
        shards += [shard] * table.num_rows
    row_of = {(shard, slot): row for row, (shard, slot) in enumerate(zip(shards, slots, strict=True))}
    try:
        order = [row_of[at] for at in zip(snapshot.shard.tolist(), snapshot.slot.tolist(), strict=True)]
    except KeyError as error:
        shard, slot = error.args[0]
        raise CorruptError(
            f"{snapshot.path / snapshot.layout.samples_file(shard)}: no row for slot {slot}, which was committed: "
            f"{remedy(snapshot.path, shard)}"
        ) from error
    return pa.concat_tables(tables).take(pa.array(order, pa.int64()))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the file cannot be read") from error


def _select(axis: str, wanted: Any, known: dict[Any, int], path: Path) -> tuple[list[int], bool]:
    """(indices along an axis, whether the axis goes)."""
    if wanted is None:
        return list(known.values()), False
    one = isinstance(wanted, str) or not isinstance(wanted, Iterable)
    found = []
    for value in [wanted] if one else wanted:
        number = None
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            # Positions from the start or the end are numbers to a user and names in the store.
            number = known.get(str(value) if axis == "position" else int(value))
        elif isinstance(value, str):
            number = known.get(value)
        if number is None:
            raise UnknownNameError(
                f"{path} has no {axis} {value!r}: it has {', '.join(map(str, known))}; a capture with other coverage "
                f"needs another folder"
            )
        found.append(number)
    return found, one
