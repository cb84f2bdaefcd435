"""TensorStore: a Zarr v3 array in the same shards and chunks, written shard by shard while the next one is filled."""

import os
from typing import Any

import numpy as np
import tensorstore as ts
from serve import serve
from store_arm import StoreArm
from store_rows import Want

# Holds the shard indices, which every read needs, and less than what is read between two reads of one cell.
_INDEX_BYTES = 32 << 20

# Holds whatever a round reads, decoded: a read copies from memory of the process, and verifies nothing.
_CACHE_BYTES = 1 << 30


class TensorStore(StoreArm):
    """spec: "checksums": whether each chunk carries a crc32c, which is verified on read."""

    def write(self) -> None:
        s = self.shape
        inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.spec["checksums"]:
            inner.append({"name": "crc32c"})
        sharding = {"chunk_shape": [1, 1, s.shard, s.hidden], "codecs": inner}
        store = ts.open(
            {
                "driver": "zarr3",
                "kvstore": self._files,
                "metadata": {
                    "shape": [s.layers, s.positions, s.samples, s.hidden],
                    "data_type": "bfloat16",
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": [s.layers, s.positions, s.shard, s.hidden]},
                    },
                    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                },
                "create": True,
            },
            context=_context(0),
        ).result()
        pending = None
        for samples in self.rows.blocks():
            block = self.block(samples).view(ts.bfloat16.numpy_dtype)
            if pending is not None:
                pending.result()
            pending = store[:, :, samples.start : samples.stop, :].write(block)
        pending.result()

    @property
    def _files(self) -> dict[str, str]:
        return {"driver": "file", "path": f"{self.folder}/"}

    def open(self) -> None:
        spec = {"driver": "zarr3", "kvstore": self._files}
        fixed = {"recheck_cached_data": False, "recheck_cached_metadata": False}
        self._ways = {
            "no cache": ts.open(spec, context=_context(0)).result(),
            "its index cached": ts.open({**spec, **fixed}, context=_context(_INDEX_BYTES)).result(),
            "its chunks cached": ts.open({**spec, **fixed}, context=_context(_CACHE_BYTES)).result(),
        }

    def close(self) -> None:
        del self._ways

    def read(self, want: Want, way: str) -> np.ndarray:
        return self._ways[way][want.index].read().result()

    def bits(self, result: np.ndarray, want: Want) -> np.ndarray:
        return result.view(np.uint16).reshape(len(want.layers), len(want.positions), len(want.samples), -1)


def _context(cache: int) -> ts.Context:
    cores = os.cpu_count() or 1
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache},
            "data_copy_concurrency": {"limit": cores},
            "file_io_concurrency": {"limit": max(32, cores)},
        }
    )


if __name__ == "__main__":
    serve(TensorStore)
