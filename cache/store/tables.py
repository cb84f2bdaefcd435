"""The Parquet tables of a capture: samples, failures and labels."""

import io
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.samples import Failure, Sample

if TYPE_CHECKING:
    import pyarrow

# pyarrow is imported where it is used: it takes 0.2 s, which `import hiddenlake` must not spend.

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
    return encode(pa.Table.from_pylist(rows, schema=failure_schema()))


def encode(table: "pyarrow.Table") -> bytes:
    """A Parquet file."""
    import pyarrow.parquet as pq

    out = io.BytesIO()
    # Commits hold a checksum of samples/; failures/ and labels/ have only the pages' own.
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def decode(raw: bytes, file: str, columns: list[str] | None = None) -> "pyarrow.Table":
    """A table from the bytes of a Parquet file. Raises CorruptError that names `file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A damaged schema field can surface as KeyError or as a failed UTF-8 decoding.
        return pq.read_table(pa.BufferReader(raw), columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(f"{file}: not a readable Parquet file ({error}): restore it from a copy") from error
