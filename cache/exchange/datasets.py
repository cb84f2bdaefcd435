"""Export as a Hugging Face dataset: a folder for `datasets.load_from_disk`.

One row a sample in task order, with the columns of samples/ and the labels, and for each site and layer

    resid_post_13          Array2D (position, width) float32; NaN where the position is absent
    tokens_resid_post_13   Array2D (token, width) float32, as many tokens as the sample has

The files are those that `Dataset.save_to_disk` makes, written a batch of rows at a time. Arrow has no bfloat16: what
is half as wide is widened to float32, exactly, which doubles it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.index import index_table
from hiddenlake.cache.exchange.plan import Plan
from hiddenlake.cache.exchange.selection import Part, Selection, pack
from hiddenlake.cache.exchange.target import Target
from hiddenlake.cache.identity import canonical_json

if TYPE_CHECKING:
    import datasets
    import pyarrow

# A batch of rows as float32, and beside it one column's stored bits, which are as much again where there is one column.
_COPIES = 3

# Arrow counts a column's values in a batch with 32 bits.
_VALUES = 2**31 - 1


def plan(selection: Selection, shard_bytes: int, memory_bytes: int) -> Plan:
    """The files of an export. A row has all sites and layers, so a batch needs memory for at least one of them.

    Raises BadInputError without datasets, or where a row does not fit.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise BadInputError(
            f"datasets cannot be imported ({error}): install `hiddenlake[datasets]`, or export another format"
        ) from error
    width = sum(part.width for part in selection.parts)
    rows = 4 * width * (len(selection.positions) + selection.lengths)
    batch = memory_bytes // _COPIES
    if rows.max() > batch:
        raise BadInputError(
            f"one row of the dataset takes {rows.max()} bytes, {_COPIES} times that does not fit in {memory_bytes} bytes "
            f"of memory: raise --memory-bytes, name fewer sites, layers or positions, or export safetensors"
        )
    widest = max(part.width for part in selection.parts)
    if widest * max(len(selection.positions), int(selection.lengths.max())) > _VALUES:
        raise BadInputError(f"one sample has more than {_VALUES} values of one site: export safetensors")
    shards = [range(*run) for run in pack(rows, shard_bytes)]
    widened = "" if selection.itemsize == 4 else f"{selection.dtype} is widened to float32, exactly: twice the bytes"
    return Plan(
        data_bytes=int(rows.sum()),
        files=len(shards),
        memory_bytes=memory_bytes,
        facts={"format": "datasets", "dtype": "float32", "stored_dtype": selection.dtype},
        write=lambda target, progress: _write(selection, rows, shards, target, progress, min(batch, 4 * _VALUES)),
        index=None,
        note=widened,
    )


def _features(selection: Selection, table: "pyarrow.Table") -> "datasets.Features":
    from datasets import Array2D, Features

    features = Features.from_arrow_schema(table.schema.remove_metadata())
    for part in selection.parts:
        # a column of the samples that has an activation's name would be hidden by it
        if taken := {part.column, f"tokens_{part.column}"} & set(table.column_names):
            raise BadInputError(
                f"the labels have a column {taken.pop()!r}, which an activation needs: rename the label"
            )
    if selection.positions:
        for part in selection.parts:
            features[part.column] = Array2D((len(selection.positions), part.width), "float32")
    if selection.tokens:
        for part in selection.parts:
            features[f"tokens_{part.column}"] = Array2D((None, part.width), "float32")
    return features


def _write(
    selection: Selection,
    sizes: np.ndarray,
    shards: list[range],
    target: Target,
    progress: Callable[[int], None],
    limit: int,
) -> None:
    import pyarrow as pa
    from datasets import DatasetInfo

    table = index_table(selection)
    features = _features(selection, table)
    schema = features.arrow_schema
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        with target.open(name) as file, pa.ipc.new_stream(file, schema) as writer:
            for start, stop in pack(sizes[rows.start : rows.stop], limit):
                chosen = range(rows.start + start, rows.start + stop)
                for batch in _batches(selection, table.slice(chosen.start, len(chosen)), chosen, schema):
                    writer.write_batch(batch)
                progress(int(sizes[chosen.start : chosen.stop].sum()))
    facts = asdict(DatasetInfo(description=f"Activations, float32: {_identity(selection)}", features=features))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(canonical_json(target.files)).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    target.write("dataset_info.json", json.dumps(facts, indent=2).encode())
    target.write("state.json", json.dumps(state, indent=2, sort_keys=True).encode())


def _identity(selection: Selection) -> str:
    return json.dumps(selection.capture.identity, ensure_ascii=False, sort_keys=True)


def _batches(
    selection: Selection, table: "pyarrow.Table", rows: range, schema: "pyarrow.Schema"
) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow as pa

    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    for part in selection.parts:
        if selection.positions:
            counts = np.full(len(rows), len(selection.positions))
            values = np.ascontiguousarray(selection.cells(part, rows, "float32").swapaxes(0, 1))
            columns[part.column] = _array(schema.field(part.column).type, values, counts, part)
        if selection.tokens:
            counts = selection.lengths[rows.start : rows.stop]
            blocks = list(selection.token_blocks(part, rows, 4 * _VALUES, "float32"))
            name = f"tokens_{part.column}"
            columns[name] = _array(
                schema.field(name).type, np.concatenate(blocks) if len(blocks) > 1 else blocks[0], counts, part
            )
    arrays = [columns[name].cast(schema.field(name).type) if name in table.column_names else columns[name]
              for name in schema.names]  # fmt: skip
    yield from pa.Table.from_arrays(arrays, schema=schema).to_batches()


def _array(kind: "pyarrow.DataType", values: np.ndarray, counts: np.ndarray, part: Part) -> "pyarrow.Array":
    """(row, ...) of Array2D. values : float32, all rows' lines of `part.width` elements, one behind the other."""
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    lines = pa.ListArray.from_arrays(pa.array(np.arange(counts.sum() + 1, dtype=np.int32) * part.width), flat)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ExtensionArray.from_storage(kind, pa.ListArray.from_arrays(pa.array(ends), lines))
