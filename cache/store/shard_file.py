"""One shard file of an activation array: where each of its bytes lies. Sample shards and token shards have one form."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.store.commits import ChunkRecord
from hiddenlake.cache.store.coverage import DTYPES

# Every inner chunk starts on a page, as direct and GPU-direct reads want it.
ALIGNMENT = 4096

# What the index of sharding_indexed says of a chunk that is not there: its cells are the fill value.
_MISSING = np.uint64(2**64 - 1)

# How chunks are stored: as they are; compressed without loss; or as float8_e4m3fn with a scale for each row.
CODECS = ("none", "zstd", "fp8")


@dataclass(frozen=True)
class ShardFile:
    """Where the bytes of one shard of one activation array lie.

    outer : chunks of a shard along the axes before the rows: (L, P), or (P,) for a site without layers; of a token
        shard (L, k) or (k,), k chunks along the token axis.
    rows : of a chunk: B samples, or T tokens.  width : W.  dtype : name.
    columns : how many chunks along the last of `outer` are in the file, the others are missing; None for all.
    codec : one of CODECS.

    The file is the chunks, each (rows, W), encoded, with its crc32c and then zeros up to the next page, and the index.
    Chunks are numbered in C order over `outer`, whether they are there or not.
    """

    outer: tuple[int, ...]
    rows: int
    width: int
    dtype: str
    columns: int | None = None
    codec: str = "none"

    @cached_property
    def bits(self) -> np.dtype:
        """What a value is in memory."""
        return DTYPES[self.dtype][0]

    @cached_property
    def stored(self) -> np.dtype:
        """What a value is in the file, once it is decompressed."""
        return np.dtype(np.uint8) if self.codec == "fp8" else self.bits

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row in the file, once it is decompressed."""
        return self.width * self.stored.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, once it is decompressed."""
        return self.rows * self.row_bytes

    @cached_property
    def fixed(self) -> bool:
        """Whether all chunks are of one size, so that rows can be read by themselves."""
        return self.codec != "zstd"

    @cached_property
    def pitch(self) -> int:
        """Bytes from the start of one chunk to the start of the next, where that is fixed."""
        return padded(self.chunk_bytes)

    @cached_property
    def present(self) -> np.ndarray:
        """Numbers of the chunks that are in the file, in its order."""
        every = np.arange(math.prod(self.outer)).reshape(self.outer)
        return every[..., : self.columns].ravel()

    @cached_property
    def place(self) -> np.ndarray:
        """(chunk,) the chunk's place in the file's order, -1 for one that is missing."""
        places = np.full(math.prod(self.outer), -1)
        places[self.present] = np.arange(len(self.present))
        return places

    def lengths(self, record: ChunkRecord) -> np.ndarray:
        """(place,) bytes of each chunk that is in the file, without its checksum. Not to be written to."""
        return self._fixed_lengths if self.fixed else np.frombuffer(record.lengths, "<u4").astype(np.int64)

    def offsets(self, lengths: np.ndarray) -> np.ndarray:
        """(place + 1,) where each chunk that is in the file starts; the last is where the index does. Not to be
        written to.
        """
        return self._fixed_offsets if lengths is self._fixed_lengths else _offsets(lengths)

    # Computed once for all files of a shape: a read that opens hundreds of them would wait for it.

    @cached_property
    def _fixed_lengths(self) -> np.ndarray:
        return np.full(len(self.present), self.chunk_bytes)

    @cached_property
    def _fixed_offsets(self) -> np.ndarray:
        return _offsets(self._fixed_lengths)

    def index(self, lengths: np.ndarray) -> bytes:
        """The shard index of sharding_indexed: (offset, bytes) a chunk, little-endian uint64, and its crc32c."""
        table = np.full((math.prod(self.outer), 2), _MISSING, "<u8")
        table[self.present, 0] = self.offsets(lengths)[:-1]
        table[self.present, 1] = lengths + 4
        raw = table.tobytes()
        return raw + crc32c(raw).to_bytes(4, "little")

    @property
    def index_bytes(self) -> int:
        return 16 * math.prod(self.outer) + 4

    @property
    def size(self) -> int:
        """Bytes of the file, where chunks are of one size; and what it takes in memory before it is compressed."""
        return len(self.present) * self.pitch + self.index_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.outer, self.rows, self.width)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a view of a file that holds all chunks, as they are, as an array of `shape`, in bytes."""
        outer = tuple(self.pitch * math.prod(self.outer[axis + 1 :]) for axis in range(len(self.outer)))
        return (*outer, self.row_bytes, self.stored.itemsize)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(padded(lengths))])


def padded(size):
    """Bytes of a chunk with its checksum, up to the next page. size : int, or an array of them."""
    return -(-(size + 4) // ALIGNMENT) * ALIGNMENT
