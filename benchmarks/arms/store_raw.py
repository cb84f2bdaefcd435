"""The limits: bytes that are in order already, written to plain files; and one contiguous, positioned read."""

import mmap
import os
from typing import Any

import numpy as np
from serve import serve
from store_arm import StoreArm
from store_rows import Want

_PAGE = 4096


class Raw(StoreArm):
    """spec: "files": one a shard, or one in all, which is what is read from; "flags": of `open`, beside the usual."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        sample = self.rows.sample(0).ravel().view(np.uint8)
        # starts on a page, as what goes past the page cache must
        self._shard = mmap.mmap(-1, len(sample) * self.shape.shard)
        np.frombuffer(self._shard, np.uint8).reshape(-1, len(sample))[:] = sample
        self._buffer = np.zeros(0, np.uint8)

    def write(self) -> None:
        self.folder.mkdir()
        one = None
        for k, samples in enumerate(self.rows.blocks()):
            if self.spec["files"] == "one a shard" or one is None:
                one = os.open(self.folder / str(k), os.O_CREAT | os.O_WRONLY | self.spec.get("flags", 0))
            rest = memoryview(self._shard)[: self.shape.bytes // self.shape.samples * len(samples)]
            while rest:
                rest = rest[os.write(one, rest) :]
            if self.spec["files"] == "one a shard":
                os.fsync(one)
                os.close(one)
        if self.spec["files"] == "one":
            os.fsync(one)
            os.close(one)

    def open(self) -> None:
        self._descriptor = os.open(self.folder / "0", os.O_RDONLY)

    def close(self) -> None:
        os.close(self._descriptor)

    def aim(self, want: Want, way: str) -> None:
        nbytes = want.bytes(self.shape)
        if len(self._buffer) < nbytes:
            self._buffer = np.full(nbytes, 1, np.uint8)  # zeros would be pages that are not there yet

    def read(self, want: Want, way: str) -> int:
        nbytes = want.bytes(self.shape)
        buffer = np.empty(nbytes, np.uint8) if way == "into new memory" else self._buffer[:nbytes]
        offset = int(want.at * (self.shape.bytes - nbytes)) // _PAGE * _PAGE
        if way == "announced":
            # all of it goes to the disk at once, and not window by window of the kernel's read-ahead
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        return os.preadv(self._descriptor, [buffer], offset)

    def bits(self, result: int, want: Want) -> None:
        if result != want.bytes(self.shape):
            raise RuntimeError(f"one read gave {result} of {want.bytes(self.shape)} bytes")


if __name__ == "__main__":
    serve(Raw)
