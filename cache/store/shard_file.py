"""One shard file of an activation array: where each of its bytes lies. Sample shards and token shards have one form."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.store.coverage import DTYPES

# Every inner chunk starts on a page, as direct and GPU-direct reads want it.
ALIGNMENT = 4096

# What the index of sharding_indexed says of a chunk that is not there: its cells are the fill value.
_MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class ShardFile:
    """Where the bytes of one shard of one activation array lie.

    outer : chunks of a shard along the axes before the rows: (L, P), or (P,) for a site without layers; of a token
        shard (L, k) or (k,), k chunks along the token axis.
    rows : of a chunk: B samples, or T tokens.  width : W.  dtype : name.
    columns : how many chunks along the last of `outer` are in the file, the others are missing; None for all.

    The file is the chunks, each (rows, W) with its crc32c and then zeros up to the next page, and the index.
    Chunks are numbered in C order over `outer`, whether they are there or not.
    """

    outer: tuple[int, ...]
    rows: int
    width: int
    dtype: str
    columns: int | None = None

    @property
    def bits(self) -> np.dtype:
        return DTYPES[self.dtype][0]

    @property
    def row_bytes(self) -> int:
        return self.width * self.bits.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.rows * self.row_bytes

    @property
    def pitch(self) -> int:
        """Bytes from the start of one chunk to the start of the next."""
        return -(-(self.chunk_bytes + 4) // ALIGNMENT) * ALIGNMENT

    @cached_property
    def present(self) -> np.ndarray:
        """Numbers of the chunks that are in the file, in its order."""
        every = np.arange(math.prod(self.outer)).reshape(self.outer)
        return every[..., : self.columns].ravel()

    def offset(self, chunk: int) -> int:
        """Where a chunk starts. Raises ValueError for one that is missing."""
        if self.columns is None:
            return chunk * self.pitch
        leading, column = divmod(chunk, self.outer[-1])
        if column >= self.columns:
            raise ValueError(f"chunk {chunk} is not in a file with {self.columns} of {self.outer[-1]} columns")
        return (leading * self.columns + column) * self.pitch

    @property
    def index_offset(self) -> int:
        return len(self.present) * self.pitch

    @property
    def size(self) -> int:
        return self.index_offset + len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.outer, self.rows, self.width)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a view of a file that holds all chunks as an array of `shape`, in bytes."""
        outer = tuple(self.pitch * math.prod(self.outer[axis + 1 :]) for axis in range(len(self.outer)))
        return (*outer, self.row_bytes, self.bits.itemsize)

    @cached_property
    def index(self) -> bytes:
        """The shard index of sharding_indexed: (offset, bytes) a chunk, little-endian uint64, and its crc32c."""
        table = np.full((math.prod(self.outer), 2), _MISSING, "<u8")
        table[self.present, 0] = np.arange(len(self.present), dtype=np.uint64) * np.uint64(self.pitch)
        table[self.present, 1] = self.chunk_bytes + 4
        raw = table.tobytes()
        return raw + crc32c(raw).to_bytes(4, "little")
