"""Reading a capture: checked byte ranges of committed shards, and nothing that was not committed."""

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.commit_rules import check_commits
from hiddenlake.cache.store.commits import Commit, Loss, list_commits, read_commits, valid
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.readable import Readable
from hiddenlake.cache.store.root import read_root
from hiddenlake.cache.store.snapshot import Snapshot
from hiddenlake.cache.store.tables import MOST_LOOSE_BYTES, decode_loose, failure_schema

if TYPE_CHECKING:
    import pyarrow


class Capture(Readable):
    """One capture, open for reading; made by `open_capture`. It shows what was committed when opened or refreshed.

    May be used from several threads. Importing this needs neither torch nor zarr.
    """

    snapshot: Snapshot

    def __init__(self, place: Backend) -> None:
        self.place = place
        self.snapshot = Snapshot(place, _generation(place), read_root(place), {})
        self.refresh()

    @property
    def path(self) -> str:
        """The folder or the URL."""
        return str(self.place)

    def refresh(self) -> None:
        """Show what was committed since."""
        self.snapshot.check_there()
        known = self.snapshot.commits
        numbers = list_commits(self.place)
        # One that was replaced is not remembered, and read again: there are few.
        new = read_commits(self.place, numbers - known.keys())
        commits = valid({k: known[k] if k in known else new[k] for k in sorted(numbers)})
        check_commits(self.place, self.snapshot.layout, commits.values())
        # The fields are replaced together, so that a thread that reads meanwhile sees one moment.
        self.snapshot = replace(self.snapshot, commits=commits)

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
        return self.snapshot.layout.samples

    @property
    def planned(self) -> int:
        """Samples that were planned when the capture was made."""
        return self.snapshot.root.planned

    @property
    def nbytes(self) -> int:
        """Bytes of all committed files."""
        # Commits share token shards.
        return sum({name: record.size for commit in self.commits for name, record in commit.files.items()}.values())

    @property
    def codec(self) -> str:
        """How chunks are stored: `none`, `zstd` or `fp8`."""
        return self.snapshot.layout.codec

    def losses(self) -> dict[str, Loss]:
        """What a lossy codec lost, by array (`mlp_out`, `tokens/mlp_out`), measured on all rows. Empty without one."""
        found: dict[str, Loss] = {}
        for commit in self.commits:
            for name, loss in commit.losses.items():
                found[name] = found.get(name, Loss()) + loss
        return found

    def failures(self) -> "pyarrow.Table":
        """Samples that could not be captured and are not committed: key, index, cause, attempts, time; the last try."""
        import pyarrow as pa

        latest: dict[str, dict[str, Any]] = {}
        for name, table in self._tables("failures").items():
            if table.schema.names != failure_schema().names or any(column.null_count for column in table.columns):
                raise CorruptError(
                    f"{self.path}/failures/{name}.parquet: not a list of failures: remove it, or restore it from a copy"
                )
            for row in table.to_pylist():
                if row["key"] not in latest or row["time"] > latest[row["key"]]["time"]:
                    latest[row["key"]] = row
        committed = self.snapshot.row_of
        rows = sorted((row for key, row in latest.items() if key not in committed), key=lambda row: row["index"])
        return pa.Table.from_pylist(rows, schema=failure_schema())

    def labels(self) -> dict[str, "pyarrow.Table"]:
        """Tables of labels that were added later, by name: a column `key`, and values."""
        found = self._tables("labels")
        for name, table in found.items():
            if "key" not in table.column_names:
                raise CorruptError(
                    f"{self.path}/labels/{name}.parquet: columns {table.column_names}, but labels need `key`: write "
                    f"the file again"
                )
        return found

    def _tables(self, folder: str) -> dict[str, "pyarrow.Table"]:
        """The Parquet files of a folder, by name."""
        found = {}
        try:
            names = sorted(self.place.list_files(folder))
        except OSError as error:
            raise trouble(f"{self.path}/{folder}", error) from error
        for name in names:
            if name.endswith(".parquet") and not name.startswith("."):
                file = f"{folder}/{name}"
                try:
                    raw = self.place.read(file, MOST_LOOSE_BYTES)
                except OSError as error:
                    raise trouble(f"{self.path}/{file}", error) from error
                found[name.removesuffix(".parquet")] = decode_loose(raw, f"{self.path}/{file}")
        return found


def open_capture(path: str | Path | Backend) -> Capture:
    """Open a capture for reading.

    path : a folder, or `s3://bucket/lake/name`.

    Raises StoreError where there is none or one of an unknown version, CorruptError where its metadata
    or a commit is damaged.
    """
    return Capture(open_backend(path))


def _generation(place: Backend) -> Hashable:
    try:
        return place.generation()
    except OSError:
        return None  # reading the root says what is wrong
