"""The Parquet tables of a capture: samples, failures and labels."""

import io
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.samples import Failure, Sample

if TYPE_CHECKING:
    import pyarrow

# pyarrow is imported where it is used: it takes 0.2 s, which `import hiddenlake` must not spend.

# Before the crc32c of a Parquet file that no commit vouches for.
_MARK = b"\x00hiddenlake crc32c\x00"

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


def decode(raw: bytes, file: str, columns: list[str] | None = None) -> "pyarrow.Table":
    """A table from the bytes of a Parquet file. Raises CorruptError that names `file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A damaged schema field can surface as KeyError or as a failed UTF-8 decoding.
        return pq.read_table(pa.BufferReader(raw), columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(f"{file}: not a readable Parquet file ({error}): restore it from a copy") from error
