"""np.memmap, layer-major: one file (layer, position, sample, hidden), written a shard's samples at once."""

import numpy as np
from serve import serve
from store_arm import StoreArm
from store_rows import Want


class Memmap(StoreArm):
    def _map(self, mode: str) -> np.memmap:
        s = self.shape
        return np.memmap(self.folder / "rows", np.uint16, mode, shape=(s.layers, s.positions, s.samples, s.hidden))

    def write(self) -> None:
        self.folder.mkdir()
        rows = self._map("w+")
        for samples in self.rows.blocks():
            rows[:, :, samples.start : samples.stop] = self.block(samples)
        rows.flush()

    def open(self) -> None:
        self._rows = self._map("r")

    def close(self) -> None:
        del self._rows

    def read(self, want: Want, way: str) -> np.ndarray:
        return np.array(self._rows[want.index])

    def bits(self, result: np.ndarray, want: Want) -> np.ndarray:
        return result.reshape(len(want.layers), len(want.positions), len(want.samples), -1)


if __name__ == "__main__":
    serve(Memmap)
