"""Tables: all samples of a capture, and its labels, as Parquet, written while they are sent."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.service import wire
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.store.snapshot import Snapshot, samples_of
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS, sample_schema

if TYPE_CHECKING:
    import pyarrow

# Read, compressed and sent at once: prompts and answers of so many samples are some megabytes.
_ROWS = 2048


def sample_parquet(snapshot: Snapshot, columns: Sequence[str] | None, limits: dict[str, int]) -> Iterator[bytes]:
    """All samples in task order, as one Parquet file in parts.

    columns : some of SAMPLE_COLUMNS; None for all.
    limits : what a client must know to ask for parts.

    Beside them `commit`, which commit holds each sample, and, where there are tokens, `stored_tokens`, how many of it are
    stored one by one. What the capture is lies in the schema's metadata, as JSON, under `hiddenlake`.

    Raises Problem for a column that does not exist, CorruptError.
    """
    import pyarrow as pa

    chosen = list(SAMPLE_COLUMNS if columns is None else dict.fromkeys(columns))
    if unknown := [name for name in chosen if name not in SAMPLE_COLUMNS]:
        raise Problem(
            422, "bad_input", f"{len(unknown)} of the columns do not exist", f"name some of {', '.join(SAMPLE_COLUMNS)}"
        )
    fields = [sample_schema().field(name) for name in chosen]
    fields.append(pa.field(wire.COMMIT, pa.dictionary(pa.int32(), pa.string()), nullable=False))
    if snapshot.coverage.tokens is not None:
        fields.append(pa.field(wire.STORED_TOKENS, pa.int64(), nullable=False))
    schema = pa.schema(fields, {wire.METADATA: json.dumps(_facts(snapshot, limits)).encode()})
    # All names in each part, in one order: the parts' dictionaries are one.
    shards = np.unique(snapshot.shard)
    names = pa.array([snapshot.commit_name(shard) for shard in shards.tolist()], pa.string())

    def parts() -> Iterator["pyarrow.Table"]:
        for start in range(0, len(snapshot.keys), _ROWS):
            rows = np.arange(start, min(start + _ROWS, len(snapshot.keys)))
            table = samples_of(snapshot, chosen, rows)
            found = [table[name] for name in chosen]
            codes = pa.array(np.searchsorted(shards, snapshot.shard[rows]), pa.int32())
            found.append(pa.DictionaryArray.from_arrays(codes, names))
            if snapshot.coverage.tokens is not None:
                found.append(pa.array(snapshot.token_length[rows]))
            yield pa.Table.from_arrays(found, schema=schema)

    return _parquet(schema, parts())


def label_parquet(table: "pyarrow.Table") -> Iterator[bytes]:
    """A table of labels as one Parquet file in parts."""
    step = 1 << 16
    return _parquet(table.schema, (table.slice(start, step) for start in range(0, len(table), step)))


def _facts(snapshot: Snapshot, limits: dict[str, int]) -> dict[str, Any]:
    root = snapshot.root
    return {
        "version": wire.VERSION,
        "snapshot": snapshot.name,
        "samples": len(snapshot.keys),
        "identity": root.identity,
        "coverage": root.coverage.to_json(),
        "limits": limits,
    }


def _parquet(schema: "pyarrow.Schema", tables: Iterator["pyarrow.Table"]) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    sink = _Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


class _Sink:
    """A file that is only written, of which nothing stays that was taken."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        found = b"".join(self._parts)
        self._parts.clear()
        return found
