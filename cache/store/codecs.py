"""Codecs of chunks: as they are, zstd without loss, fp8 with a scale for each row and a loss that is measured."""

from collections.abc import Callable, Iterator

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.store.checksums import combine, row_checksums
from hiddenlake.cache.store.commits import ChunkRecord, Loss
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.shard_file import ShardFile, padded

# The fastest that still finds what there is to find: 1.29 of real activations, where level 3 finds no more.
ZSTD_LEVEL = 1


class Encoding:
    """The bytes of one shard file, encoded while they are written: iterate over it once, then ask for the rest.

    chunks : chunk number -> (row, width) bits.
    checksums : (chunk, row) uint32 of the rows as they are, which stay that unless the codec is lossy.

    After the iteration: record; checksums of the rows as they are stored; and for fp8 scale (chunk, row) float32, and
    loss.
    """

    def __init__(self, file: ShardFile, chunks: Callable[[int], np.ndarray], checksums: np.ndarray) -> None:
        self.file, self.checksums = file, checksums
        self.scale: np.ndarray | None = None
        self.loss: Loss | None = None
        self.record: ChunkRecord | None = None
        self._chunks = chunks
        self._image: np.ndarray | None = None
        if file.codec == "fp8":
            self.scale, self.loss = np.full(checksums.shape, np.nan, "<f4"), Loss()

    @classmethod
    def of_image(cls, file: ShardFile, image: np.ndarray, checksums: np.ndarray) -> "Encoding":
        """Of a shard that lies in memory as it is to lie in the file, but for the chunks' checksums. image : uint8."""
        self = cls(file, lambda _: image, checksums)
        crcs = combine(checksums, file.row_bytes).astype("<u4")
        # Behind each chunk, whatever that is aligned to.
        np.ndarray((len(crcs), 4), np.uint8, image, file.chunk_bytes, (file.pitch, 1))[:] = crcs[:, None].view(np.uint8)
        self._image, self.record = image, ChunkRecord(image.nbytes, crcs.tobytes())
        return self

    @property
    def size(self) -> int | None:
        """Bytes of the file, where they are known before."""
        return self.file.size if self.file.fixed else None

    def __iter__(self) -> Iterator:
        if self._image is not None:
            yield self._image
            return
        file, crcs, lengths = self.file, [], []
        if file.codec == "none":
            crcs = combine(self.checksums[file.present], file.row_bytes).tolist()
        for place, number in enumerate(file.present.tolist()):
            data = self._encode(number, self._chunks(number))
            lengths.append(memoryview(data).nbytes)
            if file.codec != "none":
                crcs.append(crc32c(data))
            yield data
            yield crcs[place].to_bytes(4, "little").ljust(padded(lengths[-1]) - lengths[-1], b"\0")
        index = file.index(np.array(lengths))
        yield index
        size = int(file.offsets(np.array(lengths))[-1]) + len(index)
        kept = b"" if file.fixed else np.array(lengths, "<u4").tobytes()
        self.record = ChunkRecord(size, np.array(crcs, "<u4").tobytes(), kept)

    def _encode(self, number: int, bits: np.ndarray):
        if self.file.codec == "none":
            return bits
        if self.file.codec == "zstd":
            from numcodecs.zstd import compress

            return compress(bits, ZSTD_LEVEL)
        from hiddenlake.cache.store import fp8

        rows = bits.view(DTYPES[self.file.dtype][1])
        codes, self.scale[number] = fp8.encode(rows)
        self.checksums[number] = row_checksums(codes)
        self.loss += fp8.error(rows, codes, self.scale[number])
        return codes


def decompress(data: np.ndarray, out: np.ndarray) -> None:
    """zstd. data : (n,) uint8.  out : C-contiguous, filled. Raises ValueError where it does not hold as many bytes."""
    from numcodecs.zstd import decompress as decode

    # Read before anything is decoded: the decoder would leave the rest of a larger buffer as it was.
    if _content_bytes(data) != out.nbytes:
        raise ValueError(f"a frame of {_content_bytes(data)} bytes, but {out.nbytes} were expected")
    try:
        decode(data, out.reshape(-1).view(np.uint8))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _content_bytes(data: np.ndarray) -> int | None:
    """What a zstd frame says that it holds (RFC 8878, 3.1.1.1), or None where it does not say it."""
    head = data[:18].tobytes()
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6:
        return None
    single, size = head[4] >> 5 & 1, (0, 2, 4, 8)[head[4] >> 6]
    start = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    if not size:
        return head[start] if single and start < len(head) else None
    return int.from_bytes(head[start : start + size], "little") + (256 if size == 2 else 0)


def values(stored: np.ndarray, scale: np.ndarray | None, file: ShardFile, wanted: str, out: np.ndarray) -> None:
    """Rows as they are stored, decoded into what was asked for.

    stored : (..., width).  scale : (...,) float32 for fp8.  wanted : `stored` or `float32`.
    out : (..., width) of `result_dtype`.
    """
    if file.codec == "fp8":
        from hiddenlake.cache.store import fp8

        out[...] = fp8.decode(stored, scale, "float32" if wanted == "float32" else file.dtype)
    elif wanted == "stored" or file.dtype == "float32":
        out[...] = stored.view(out.dtype)
    elif file.dtype == "bfloat16":
        wide = out.view(np.uint32)
        wide[...] = stored
        wide <<= 16
    else:
        out[...] = stored.view(DTYPES[file.dtype][1])


def result_dtype(file: ShardFile, wanted: str) -> np.dtype:
    """Of what a read returns."""
    return np.dtype(np.float32) if wanted == "float32" else DTYPES[file.dtype][1]
