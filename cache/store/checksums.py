"""crc32c of long runs of bytes from the crc32c of their parts, without reading a byte again.

crc(A + B) = shift(crc(A), len(B)) ^ crc(B), where shifting by n bytes is multiplication with x^(8n) modulo the polynomial:
linear over GF(2), so that 32 products decide it. As in crc32_combine of zlib (Mark Adler), here for whole arrays at once.
"""

import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from crc32c import crc32c

# Rows that are copied together, and their bytes: half of what a core's cache holds.
_PIECE_ROWS, _PIECE_BYTES = 512, 1 << 19

# Sizes of rows for which a thread keeps memory, beside the newest: sites of different width.
_SIZES = 3

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected: bit 31 is x^0


@lru_cache(256)
def _tables(length: int) -> np.ndarray:
    """(4, 256) uint32: what each byte of a crc becomes when `length` bytes follow."""
    power, square = 0x80000000, 0x00800000  # x^0 and x^8
    while length:
        if length & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        length >>= 1
    columns = [power]
    for _ in range(31):
        columns.append((columns[-1] >> 1) ^ (_POLYNOMIAL if columns[-1] & 1 else 0))
    columns.reverse()  # columns[i] : of bit i
    tables = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            where = (np.arange(256) >> bit) & 1 == 1
            tables[byte, where] ^= np.uint32(columns[8 * byte + bit])
    return tables


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def shift(crcs: np.ndarray, length: int) -> np.ndarray:
    """What crcs contribute when `length` bytes follow. crcs : uint32, any shape."""
    tables = _tables(length)
    # intp: any other index type is converted at every lookup
    parts = crcs.astype(np.intp)
    found = tables[0][parts & 255]
    found ^= tables[1][(parts >> 8) & 255]
    found ^= tables[2][(parts >> 16) & 255]
    found ^= tables[3][parts >> 24]
    return found


def combine(crcs: np.ndarray, length: int) -> np.ndarray:
    """crc32c of parts that follow each other along the last axis, each `length` bytes long.

    crcs : (..., n) uint32.  Returns (...,) uint32; 0, the crc of nothing, for n = 0.
    """
    crcs = np.asarray(crcs, np.uint32)
    if not crcs.shape[-1]:
        return np.zeros(crcs.shape[:-1], np.uint32)
    while (n := crcs.shape[-1]) > 1:
        if n % 2:
            # nothing in front changes nothing
            crcs = np.concatenate([np.zeros_like(crcs[..., :1]), crcs], -1)
        crcs = shift(crcs[..., ::2], length) ^ crcs[..., 1::2]
        length *= 2
    return crcs[..., 0]


def row_checksums(rows: np.ndarray) -> np.ndarray:
    """crc32c of each row of an array (..., width) whose rows are contiguous: (rows,) uint32, in C order."""
    return np.concatenate([np.empty(0, np.uint32), *(crcs for _, crcs in checked_pieces(rows))])


def checked_pieces(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, width) of an array (..., width) whose rows are contiguous, piece by piece in C order, and crc32c of each row,
    (row,) uint32.

    A piece is a copy, in memory that is used again for the next: it stays in the CPU's cache for whatever else is asked
    of it, and its rows need not be made into objects again, which takes as long as their checksums do.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    memory, views = _scratch.take(flat.shape[-1] * flat.itemsize)
    memory = memory.view(flat.dtype)
    for start in range(0, len(flat), len(views)):
        piece = memory[: min(len(views), len(flat) - start)]
        np.copyto(piece, flat[start : start + len(piece)])
        yield piece, np.fromiter(map(crc32c, views), np.uint32, len(piece))


class _Scratch(threading.local):
    """Memory of one thread, by the size of a row."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[np.ndarray, list[memoryview]]] = {}

    def take(self, row_bytes: int) -> tuple[np.ndarray, list[memoryview]]:
        """((row, byte) uint8, each row of it)."""
        if row_bytes not in self._of:
            rows = min(_PIECE_ROWS, max(1, _PIECE_BYTES // max(1, row_bytes)))
            memory = np.empty((rows, row_bytes), np.uint8)
            self._of = {row_bytes: (memory, list(map(memoryview, memory))), **dict(list(self._of.items())[:_SIZES])}
        return self._of[row_bytes]


_scratch = _Scratch()
