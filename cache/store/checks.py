"""Checks of one activation file: every byte of it against what was committed, and which rows hold what."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.checksums import row_checksums
from hiddenlake.cache.store.codecs import decompress, result_dtype, values
from hiddenlake.cache.store.opened import Committed, OpenFile
from hiddenlake.cache.store.ranges import check_index, read_range

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


def check_file(committed: Committed, expected: Expected) -> Iterator[Problem]:
    """One activation file: size, every chunk, every row, the index, and what is NaN."""
    name = committed.name
    try:
        file = OpenFile(committed)
    except CorruptError as error:
        yield Problem(name, None, str(error))
        return
    rows = scale = None
    try:
        rows = file.load(committed.row_crc, "<u4")
    except CorruptError as error:
        yield Problem(committed.row_crc, None, str(error))
    try:
        scale = file.load(committed.scale, "<f4") if committed.shape.codec == "fp8" else None
    except CorruptError as error:
        yield Problem(committed.scale, None, str(error))
        return
    try:
        for place, number in enumerate(committed.shape.present.tolist()):
            found = None if rows is None else rows[place]
            factors = None if scale is None else scale[place]
            yield from _check_chunk(file, place, found, factors, expected(number))
        check_index(file)
    except CorruptError as error:
        yield Problem(name, None, str(error))
    finally:
        file.file.close()


def _check_chunk(
    file: OpenFile, place: int, rows: np.ndarray | None, scale: np.ndarray | None, expected: np.ndarray
) -> Iterator[Problem]:
    shape, name = file.committed.shape, file.committed.name
    offset, length = int(file.offsets[place]), int(file.lengths[place])
    end = int(file.offsets[place + 1]) if place + 1 < len(file.offsets) else file.file.size - shape.index_bytes
    page = np.empty(end - offset, np.uint8)
    read_range(file, offset, page)
    data, tail = page[:length], page[length:]

    def start_of(slot: int) -> int:
        return offset + slot * shape.row_bytes if shape.fixed else offset

    found = crc32c(data)
    if found != int(file.crcs[place]):
        yield Problem(
            name, offset, f"the chunk has crc32c {found:#010x}, but {int(file.crcs[place]):#010x} was committed"
        )
    stored = int.from_bytes(tail[:4].tobytes(), "little")
    if stored != int(file.crcs[place]):
        yield Problem(
            name, offset + length, f"crc32c {stored:#010x} is stored, but {int(file.crcs[place]):#010x} was committed"
        )
    if tail[4:].any():
        yield Problem(name, offset + length + 4, "the space up to the next page is not empty")
    if not shape.fixed:
        plain = np.empty(shape.chunk_bytes, np.uint8)
        try:
            decompress(data, plain)
        except ValueError as error:
            yield Problem(name, offset, f"the chunk cannot be decompressed ({error})")
            return
        data = plain
    stored_rows = data.view(shape.stored).reshape(shape.rows, shape.width)
    if rows is not None:
        wrong = np.flatnonzero(row_checksums(stored_rows) != rows)
        for slot in wrong.tolist():
            yield Problem(name, start_of(slot), f"row {slot} of the chunk differs from its row_crc")
    decoded = np.empty(stored_rows.shape, result_dtype(shape, "float32"))
    values(stored_rows, scale, shape, "float32", decoded)
    finite, nan = np.isfinite(decoded).all(-1), np.isnan(decoded).all(-1)
    wrong = np.where(expected == FINITE, ~finite, (expected == NAN) & ~nan)
    for slot in np.flatnonzero(wrong).tolist():
        what = "is not finite" if expected[slot] == FINITE else "holds values, though its token is absent"
        yield Problem(name, start_of(slot), f"row {slot} of the chunk {what}")
