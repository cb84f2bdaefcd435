"""The Parquet tables of a capture: samples, failures and labels."""

import io
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.samples import Failure, Sample

if TYPE_CHECKING:
    import pyarrow

# pyarrow is imported where it is used: it takes 0.2 s, which `import hiddenlake` must not spend.

# Of one table, in memory: a shard of 65,536 samples with prompts of 30,000 characters each.
_MOST_BYTES = 2 << 30

# What writers of Parquet let a dictionary grow to, before they store values one by one.
_DICTIONARY_BYTES = 1 << 20

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
    return _encode(pa.table(columns, schema=sample_schema()))


def encode_failures(failures: Iterable[tuple[Failure, datetime]]) -> bytes:
    """failures/<writer>.parquet."""
    import pyarrow as pa

    rows = [
        {"key": f.key, "index": f.index, "cause": f.cause, "attempts": f.attempts, "time": time} for f, time in failures
    ]
    return _encode(pa.Table.from_pylist(rows, schema=failure_schema()))


def _encode(table: "pyarrow.Table") -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    # Commits hold a checksum of samples/; failures/ and labels/ have only the pages' own.
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def _decoded_bytes(file: "pyarrow.parquet.ParquetFile", columns: list[str] | None) -> int:
    """What a file's columns may take in memory, before any of them is decoded; roughly, but never too little by much.

    A page of few bytes can hold a value many times: as a dictionary, or as a run of equal ones.
    """
    metadata, total = file.metadata, 0
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        for chunk in (group.column(number) for number in range(group.num_columns)):
            if columns is not None and chunk.path_in_schema.split(".")[0] not in columns:
                continue
            strings = chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            # The longest value is no longer than the column, and its dictionary than a page of one.
            value = min(chunk.total_uncompressed_size, _DICTIONARY_BYTES) if strings and _repeats(chunk) else 8
            total += chunk.total_uncompressed_size + chunk.num_values * value
    return total


def _repeats(chunk: Any) -> bool:
    """Whether the column's values are more than its bytes can hold one by one, so that they must repeat."""
    return chunk.total_uncompressed_size < 4 * chunk.num_values


def decode(raw: bytes, file: str, columns: list[str] | None = None) -> "pyarrow.Table":
    """A table from the bytes of a Parquet file. Raises CorruptError that names `file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        size = _decoded_bytes(pq.ParquetFile(pa.BufferReader(raw)), columns)
        if size > _MOST_BYTES:
            raise ValueError(f"{len(raw)} bytes that say to hold {size}")
        # A damaged schema field can surface as KeyError or as a failed UTF-8 decoding.
        return pq.read_table(pa.BufferReader(raw), columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(f"{file}: not a readable Parquet file ({error}): restore it from a copy") from error
