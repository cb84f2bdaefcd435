"""zarr-python: an array in the same shards and chunks, without checksums of chunks, written shard by shard."""

import numpy as np
import zarr
from serve import serve
from store_arm import StoreArm
from store_rows import Want


class ZarrPython(StoreArm):
    """bfloat16 is stored as its bits: zarr-python has no such type of its own."""

    def write(self) -> None:
        s = self.shape
        array = zarr.create_array(
            store=str(self.folder),
            shape=(s.layers, s.positions, s.samples, s.hidden),
            shards=(s.layers, s.positions, s.shard, s.hidden),
            chunks=(1, 1, s.shard, s.hidden),
            dtype="uint16",
            compressors=None,
            fill_value=0,
            config={"write_empty_chunks": True},  # else each chunk is compared with zeros first
        )
        for samples in self.rows.blocks():
            array[:, :, samples.start : samples.stop, :] = self.block(samples)

    def open(self) -> None:
        self._array = zarr.open_array(str(self.folder), mode="r")

    def close(self) -> None:
        del self._array

    def read(self, want: Want, way: str) -> np.ndarray:
        layer, position, samples = want.index
        if isinstance(samples, np.ndarray):
            return self._array.oindex[layer, position, samples]
        return self._array[layer, position, samples]

    def bits(self, result: np.ndarray, want: Want) -> np.ndarray:
        return np.asarray(result).reshape(len(want.layers), len(want.positions), len(want.samples), -1)


if __name__ == "__main__":
    # The best of seven settings on two cores, by little: the defaults are 10 and 1.
    zarr.config.set({"async.concurrency": 64, "codec_pipeline.batch_size": 1024})
    serve(ZarrPython)
