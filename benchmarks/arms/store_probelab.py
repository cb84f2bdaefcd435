"""probelab's memmap store: all activations gathered in memory, saved at once; a file a layer, tokens of all samples."""

import numpy as np
import torch
from probelab import Activations
from probelab.storage import load_memmap, save_memmap
from serve import serve
from store_arm import StoreArm
from store_rows import Want


class Probelab(StoreArm):
    def write(self) -> None:
        s = self.shape
        rows = np.empty((s.samples, s.positions, s.layers, s.hidden), np.uint16)
        for i in range(s.samples):
            rows[i] = self.rows.sample(i).swapaxes(0, 1)
        activations = Activations.from_flat(
            torch.from_numpy(rows).view(torch.bfloat16).flatten(0, 1),
            torch.arange(s.samples + 1) * s.positions,
            dims="blsh",
            layers=tuple(range(s.layers)),
        )
        save_memmap(activations, str(self.folder))

    def read(self, want: Want, way: str) -> list[torch.Tensor]:
        return [self._layer(load_memmap(str(self.folder), layer=layer), want) for layer in want.layers]

    def _layer(self, activations: Activations, want: Want) -> torch.Tensor:
        """(sample and position, hidden), in memory: `data` is a view of the file."""
        if len(want.samples) == 1:
            start = int(activations.offsets[want.samples[0]])
            return activations.data[start + want.positions.start : start + want.positions.stop].clone()
        starts = activations.offsets[:-1]
        if len(want.samples) < self.shape.samples:
            starts = starts[torch.tensor(want.samples)]
        return activations.data[(starts[:, None] + torch.tensor(want.positions)).flatten()]

    def bits(self, result: list[torch.Tensor], want: Want) -> np.ndarray:
        shape = (len(want.layers), len(want.samples), len(want.positions), self.shape.hidden)
        return torch.stack(result).view(torch.uint16).numpy().reshape(shape).swapaxes(1, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Probelab)
