"""Index: the samples of an export as one Parquet table, with their labels and where their activations lie."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.selection import Selection
from hiddenlake.cache.exchange.target import Target

if TYPE_CHECKING:
    import pyarrow

# Rows of a row group: what a reader of a few rows decodes.
_GROUP_ROWS = 10_000


def index_table(selection: Selection, places: Mapping[str, np.ndarray] | None = None) -> "pyarrow.Table":
    """One row a sample in task order: `key`, `row`, the columns of samples/ but the store's own `slot`, the labels
    (`<name>`, or `<name>_<column>`), and `places`.

    token_index : of the exported positions.
    places : column -> (sample,) integers.

    Raises BadInputError for labels that cannot stand beside the samples' columns.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = selection.samples.drop_columns(["slot"])
    captured = selection.capture.coverage.positions
    columns = [captured.index(name) for name in selection.positions]
    indices = table["token_index"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, len(captured))
    offsets = np.arange(table.num_rows + 1, dtype=np.int32) * len(columns)
    chosen = pa.ListArray.from_arrays(pa.array(offsets), pa.array(indices[:, columns].ravel(), pa.int32()))
    table = table.set_column(table.column_names.index("token_index"), "token_index", chosen)
    keys = table["key"].combine_chunks()
    for name, labels in selection.capture.labels().items():
        labelled = labels["key"].combine_chunks()
        if len(pc.unique(labelled)) != len(labelled):
            raise BadInputError(f"labels/{name}.parquet: a key occurs twice: label each sample once")
        rows = pc.index_in(keys, labelled)
        found = [column for column in labels.column_names if column != "key"]
        for column in found:
            title = name if len(found) == 1 else f"{name}_{column}"
            if title in (*table.column_names, "row", *(places or {})):
                raise BadInputError(f"labels/{name}.parquet: the table has a column {title!r} already: rename the file")
            table = table.append_column(title, labels[column].combine_chunks().take(rows))
    table = table.add_column(1, "row", pa.array(np.arange(table.num_rows, dtype=np.int64)))
    for name, numbers in (places or {}).items():
        table = table.append_column(name, pa.array(numbers))
    return table


def write_index(target: Target, name: str, table: "pyarrow.Table") -> None:
    """Write the table as a Parquet file of row groups."""
    import pyarrow.parquet as pq

    with target.open(name) as file, pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        for group in _groups(table):
            writer.write_table(group)


def _groups(table: "pyarrow.Table") -> Iterator["pyarrow.Table"]:
    return (table.slice(start, _GROUP_ROWS) for start in range(0, table.num_rows, _GROUP_ROWS))
