"""The Parquet tables of a capture: samples, failures and labels."""

import io
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.store.layout import Layout

if TYPE_CHECKING:
    import pyarrow

# pyarrow is imported where it is used: it takes 0.2 s, which `import hiddenlake` must not spend.

# Before the crc32c of a Parquet file that no commit vouches for.
_MARK = b"\x00hiddenlake crc32c\x00"
# A table may take so much memory, or so many times its bytes in the file: text that is compressed, and its labels as
# dictionaries, take 20 times as much at most.
_MOST_BYTES, _MOST_TIMES = 64 << 20, 100

# Of a file that no commit names the size of: labels of millions of samples.
MOST_LOOSE_BYTES = 1 << 30

SAMPLE_COLUMNS = (
    "key", "slot", "index", "sample_index", "group", "prompt", "answer", "answers", "correct", "exact_answer",
    "exact_answer_valid", "token_ids", "logprobs", "prompt_length", "total_length", "finish_reason", "token_index",
    "status", "checksum",
)  # fmt: skip


def sample_schema() -> "pyarrow.Schema":
    """The fixed columns of samples/<shard>.parquet."""
    import pyarrow as pa

    types = {
        "slot": pa.int32(),
        "index": pa.int64(),
        "sample_index": pa.int32(),
        "answers": pa.list_(pa.string()),
        "correct": pa.bool_(),
        "exact_answer_valid": pa.bool_(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "prompt_length": pa.int32(),
        "total_length": pa.int32(),
        "token_index": pa.list_(pa.int32()),
    }
    nullable = ("correct", "exact_answer")
    return pa.schema(
        [pa.field(name, types.get(name, pa.string()), nullable=name in nullable) for name in SAMPLE_COLUMNS]
    )


def failure_schema() -> "pyarrow.Schema":
    """The columns of failures/<writer>.parquet."""
    import pyarrow as pa

    return pa.schema(
        {
            "key": pa.string(),
            "index": pa.int64(),
            "cause": pa.string(),
            "attempts": pa.int32(),
            "time": pa.timestamp("us", tz="UTC"),
        }
    )


def encode_samples(samples: Mapping[int, Sample]) -> bytes:
    """samples/<shard>.parquet. samples : slot -> sample."""
    import pyarrow as pa

    columns = {
        name: [slot if name == "slot" else getattr(samples[slot], name) for slot in sorted(samples)]
        for name in SAMPLE_COLUMNS
    }
    return encode(pa.table(columns, schema=sample_schema()))


def encode_failures(failures: Iterable[tuple[Failure, datetime]]) -> bytes:
    """failures/<writer>.parquet."""
    import pyarrow as pa

    rows = [
        {"key": f.key, "index": f.index, "cause": f.cause, "attempts": f.attempts, "time": time} for f, time in failures
    ]
    return _mark(encode(pa.Table.from_pylist(rows, schema=failure_schema())))


def encode(table: "pyarrow.Table") -> bytes:
    """A Parquet file."""
    import pyarrow.parquet as pq

    out = io.BytesIO()
    # Commits hold a checksum of samples/, failures/ have a mark; labels/ may have only the pages' own.
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def parquet_table(source: Any, columns: list[str] | None = None, **options: Any) -> "pyarrow.Table":
    """A Parquet file's table, read in this thread alone.

    source : a path, or what pyarrow reads from.  options : of pyarrow's ParquetFile.

    pyarrow's own pool of threads, once it has started, now and then aborts a process that ends
    (https://github.com/apache/arrow/issues/34314), and the status of a command would be a lie.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(source, pre_buffer=False, **options) as file:
        return file.read(columns, use_threads=False)


def _mark(raw: bytes) -> bytes:
    """A Parquet file with a crc32c of all its bytes, before the footer, where readers do not look.

    The pages' own checksums leave out the page headers and the footer: the names, types and numbers of what is there.
    """
    start = _footer(raw)
    return raw[:start] + _MARK + crc32c(raw).to_bytes(4, "little") + raw[start:]


def _footer(raw: bytes) -> int:
    """Where the footer starts; below 0 where there is none."""
    return len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")


def decode_loose(raw: bytes, file: str) -> "pyarrow.Table":
    """A table that no commit vouches for: checked by its mark, where it has one. Raises CorruptError that names `file`."""
    import pyarrow as pa

    at = raw.rfind(_MARK)
    if at >= 0:
        rest = at + len(_MARK) + 4
        if crc32c(raw[:at] + raw[rest:]).to_bytes(4, "little") != raw[at + len(_MARK) : rest]:
            raise CorruptError(
                f"{file}: its bytes do not have the crc32c at byte {at + len(_MARK)}: restore it from a copy"
            )
    table = decode(raw, file)
    try:
        table.validate(full=True)
        table.schema.names
    except (pa.ArrowException, ValueError) as error:
        raise CorruptError(f"{file}: not a readable Parquet file ({error}): restore it from a copy") from error
    return table


def _check_decoded(raw: bytes, columns: list[str] | None) -> None:
    """Raise ValueError where a table would take too much memory, before it does: compressed pages, dictionaries and runs
    of equal values can make any number of few bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(pa.BufferReader(raw)).metadata
    least = most = 0
    strings = set()
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        for chunk in (group.column(number) for number in range(group.num_columns)):
            if columns is not None and chunk.path_in_schema.split(".")[0] not in columns:
                continue
            least += chunk.total_uncompressed_size + 8 * chunk.num_values
            if chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
                strings.add(chunk.path_in_schema)
                most += chunk.total_uncompressed_size * chunk.num_values
    found, allowed = least + most, max(_MOST_BYTES, _MOST_TIMES * len(raw))
    if least <= allowed < found:
        # Each distinct value is read once, and its length counted as often as it occurs.
        names = sorted({name.split(".")[0] for name in strings})
        table = parquet_table(pa.BufferReader(raw), names, read_dictionary=sorted(strings))
        found = least + sum(_bytes(chunk) for column in table.columns for chunk in column.chunks)
    if found > allowed:
        raise ValueError(f"{len(raw)} bytes would take {found} in memory: at most {allowed} are expected")


def _bytes(values: "pyarrow.Array") -> int:
    """Of strings, once they are no dictionary any more."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    if not pa.types.is_dictionary(values.type):
        return values.nbytes
    lengths = pc.binary_length(values.dictionary).fill_null(0).to_numpy(zero_copy_only=False)
    counts = np.bincount(values.indices.drop_null().to_numpy(), minlength=len(lengths))
    return int(counts.astype(object) @ lengths.astype(object)) if len(lengths) else 0


def decode(raw: bytes, file: str, columns: list[str] | None = None) -> "pyarrow.Table":
    """A table from the bytes of a Parquet file. Raises CorruptError that names `file`."""
    import pyarrow as pa

    try:
        _check_decoded(raw, columns)
        # A damaged schema field can surface as KeyError or as a failed UTF-8 decoding.
        table = parquet_table(pa.BufferReader(raw), columns, page_checksum_verification=True)
        if columns is not None and (lacking := set(columns) - set(table.column_names)):
            raise ValueError(f"it has no column {', '.join(sorted(lacking))}")
        return table
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise CorruptError(f"{file}: not a readable Parquet file ({error}): restore it from a copy") from error


def check_rows(table: "pyarrow.Table", layout: Layout) -> None:
    """Raise ValueError for columns of samples/<shard>.parquet without which a row means nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for field in sample_schema():
        if field.name not in table.column_names:
            continue
        column = table[field.name]
        if not field.nullable and column.null_count:
            raise ValueError(f"a row has no {field.name}")
        if pa.types.is_integer(field.type) and not pa.types.is_integer(column.type):
            raise ValueError(f"{field.name} is of type {column.type}: expected {field.type}")
        if pa.types.is_list(field.type) and not pa.types.is_list(column.type):
            raise ValueError(f"{field.name} is of type {column.type}: expected {field.type}")
        if pa.types.is_list(field.type) and pc.list_flatten(column).null_count:
            raise ValueError(f"a value of {field.name} is null")
    if not len(table):
        return
    if "slot" in table.column_names:
        found = table["slot"].to_pylist()
        if len(set(found)) != len(found) or not 0 <= min(found) <= max(found) < layout.samples:
            raise ValueError(
                f"it has the slots {sorted(found)[:9]}: expected some of 0 to {layout.samples - 1}, each once"
            )
    if "token_index" in table.column_names:
        found = set(pc.list_value_length(table["token_index"]).to_pylist())
        if found != {len(layout.coverage.positions)}:
            raise ValueError(f"rows have {sorted(found)} token indices: expected {len(layout.coverage.positions)}")
