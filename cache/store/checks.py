"""Checks of one activation file: every byte of it against what was committed, and which rows hold what."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.commits import Commit, read_checked
from hiddenlake.cache.store.shard_file import ShardFile

# What a row must hold: values, NaN, or anything.
FINITE, NAN, ANYTHING = 1, -1, 0

# chunk number -> (row,) one of these
Expected = Callable[[int], np.ndarray]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was committed. file : inside the capture. offset : in bytes, None for the whole."""

    file: str
    offset: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.offset is None else f' at byte {self.offset}'}: {self.what}"


def check_file(
    path: Path, name: str, row_crc: str, file: ShardFile, commit: Commit, expected: Expected
) -> Iterator[Problem]:
    """One activation file: size, every chunk, every row, the index, and what is NaN.

    name, row_crc : the file and its row checksums, inside the capture.  commit : vouches for both.
    """
    record = commit.files[name]
    rows = None
    try:
        raw = read_checked(path, row_crc, commit.files[row_crc], [commit.shard])
        chunks = math.prod(file.outer)
        rows = np.frombuffer(raw, "<u4", chunks * file.rows).reshape(chunks, file.rows)
    except CorruptError as error:
        yield Problem(row_crc, None, str(error))
    try:
        stream = open(path / name, "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        yield Problem(name, None, f"{error.strerror}, but it was committed with {record.size} bytes")
        return
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if not size == record.size == file.size:
            yield Problem(name, min(size, file.size), f"{size} bytes, but {record.size} were committed")
            return
        page, whole, problems = np.empty(file.pitch, np.uint8), 0, 0
        for chunk in file.present.tolist():
            stream.readinto(page)
            whole = crc32c(page, whole)
            found = rows if rows is None else rows[chunk]
            for problem in _check_chunk(name, file, file.offset(chunk), page, found, expected(chunk)):
                problems += 1
                yield problem
        index = stream.read()
        if index != file.index:
            problems += 1
            yield Problem(name, file.index_offset, "the shard index differs from the layout's")
        if crc32c(index, whole) != record.crc32c and not problems:
            yield Problem(name, None, f"crc32c of the file is not the committed {record.crc32c:#010x}")


def _check_chunk(
    name: str, file: ShardFile, offset: int, page: np.ndarray, rows: np.ndarray | None, expected: np.ndarray
) -> Iterator[Problem]:
    data = page[: file.chunk_bytes]
    stored = int.from_bytes(page[file.chunk_bytes : file.chunk_bytes + 4].tobytes(), "little")
    if crc32c(data) != stored:
        yield Problem(name, offset, f"the chunk has crc32c {crc32c(data):#010x}, but {stored:#010x} was stored")
    if rows is not None:
        found = np.fromiter(map(crc32c, data.reshape(file.rows, -1)), np.uint32, file.rows)
        for slot in np.flatnonzero(found != rows).tolist():
            yield Problem(name, offset + slot * file.row_bytes, f"row {slot} of the chunk differs from its row_crc")
    bits = data.view(file.bits).reshape(file.rows, file.width)
    if file.dtype == "bfloat16":
        finite = (bits & np.uint16(0x7F80)) != 0x7F80
        nan = ~finite & ((bits & np.uint16(0x007F)) != 0)
    else:
        finite, nan = np.isfinite(bits), np.isnan(bits)
    wrong = np.where(expected == FINITE, ~finite.all(-1), (expected == NAN) & ~nan.all(-1))
    for slot in np.flatnonzero(wrong).tolist():
        what = "is not finite" if expected[slot] == FINITE else "holds values, though its token is absent"
        yield Problem(name, offset + slot * file.row_bytes, f"row {slot} of the chunk {what}")
