"""safetensors, a file a request, as vLLM's hidden-states connector lays it out: (token, layer, hidden) and the ids."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from serve import serve
from store_arm import StoreArm
from store_rows import Want

_TENSOR = "hidden_states"

# As many as the connector has by default.
_THREADS = 8


class Safetensors(StoreArm):
    def write(self) -> None:
        self.folder.mkdir()
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._save, range(self.shape.samples)):
                pass

    def _save(self, i: int) -> None:
        rows = np.ascontiguousarray(self.rows.sample(i).swapaxes(0, 1))
        ids = torch.arange(self.shape.positions)
        save_file({_TENSOR: torch.from_numpy(rows).view(torch.bfloat16), "token_ids": ids}, self._file(i))

    def _file(self, i: int) -> str:
        return f"{self.folder}/{i}.safetensors"

    def read(self, want: Want, way: str) -> torch.Tensor:
        layers = slice(want.layers.start, want.layers.stop)
        positions = slice(want.positions.start, want.positions.stop)
        shape = (len(want.samples), len(want.positions), len(want.layers), self.shape.hidden)
        out = torch.empty(shape, dtype=torch.bfloat16)
        for place, i in enumerate(want.samples):
            with safe_open(self._file(i), "pt") as file:
                out[place] = file.get_slice(_TENSOR)[positions, layers]
        return out

    def bits(self, result: torch.Tensor, want: Want) -> np.ndarray:
        return result.view(torch.uint16).numpy().transpose(2, 1, 0, 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Safetensors)
