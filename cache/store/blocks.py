"""Blocks: a large read cut into parts of bounded size, one behind the other."""

from collections.abc import Iterator, Sequence

import numpy as np


def blocks(
    outer: Sequence[Sequence[int]], rows: np.ndarray, row_bytes: int, most_bytes: int, most_rows: int | None = None
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Parts of a C-ordered block (*outer, row), in its order: (indices along each outer axis, rows).

    row_bytes : of one row.  most_bytes : of a part; one of a single row may have more.
    most_rows : that a part names along the last axis; any number by default.
    """
    step = max(1, most_bytes // max(1, row_bytes))
    if not outer:
        step = min(step, most_rows or step)
        for start in range(0, len(rows), step):
            yield [], rows[start : start + step]
        return
    first, *rest = [np.asarray(axis, np.int64) for axis in outer]
    inner = row_bytes * len(rows) * int(np.prod([len(axis) for axis in rest], dtype=np.int64))
    if inner <= most_bytes and len(rows) <= (most_rows or len(rows)):
        step = max(1, most_bytes // max(1, inner))
        for start in range(0, len(first), step):
            yield [first[start : start + step], *rest], rows
        return
    for index in first:
        for others, part in blocks(rest, rows, row_bytes, most_bytes, most_rows):
            yield [np.array([index]), *others], part
