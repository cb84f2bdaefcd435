"""lmprobe's cache: a safetensors file a prompt, a tensor a layer, through the functions that its extraction calls."""

import numpy as np
import torch
from lmprobe.cache import load_layer_across_prompts, load_prompt_activations, save_prompt_activations, set_cache_backend
from serve import serve
from store_arm import StoreArm
from store_rows import Want

_MODEL = "synthetic"


class Lmprobe(StoreArm):
    def write(self) -> None:
        s = self.shape
        set_cache_backend(str(self.folder))
        layers, mask = list(range(s.layers)), torch.ones(1, s.positions, dtype=torch.long)
        for i in range(s.samples):
            rows = np.ascontiguousarray(self.rows.sample(i).swapaxes(0, 1))
            save_prompt_activations(
                _MODEL,
                _prompt(i),
                layers,
                torch.from_numpy(rows).view(torch.bfloat16).reshape(1, s.positions, -1),
                mask,
            )

    def read(self, want: Want, way: str) -> torch.Tensor:
        prompts = [_prompt(i) for i in want.samples]
        positions = slice(want.positions.start, want.positions.stop)
        if len(want.layers) == 1:
            rows, _ = load_layer_across_prompts(_MODEL, prompts, want.layers[0])
            return torch.stack([row[0, positions] for row in rows])[:, :, None]
        found = [load_prompt_activations(_MODEL, prompt, list(want.layers))[0][0, positions] for prompt in prompts]
        return torch.stack(found).unflatten(2, (len(want.layers), -1))

    def bits(self, result: torch.Tensor, want: Want) -> np.ndarray:
        return result.contiguous().view(torch.uint16).numpy().transpose(2, 1, 0, 3)


def _prompt(i: int) -> str:
    return f"Which is number {i}?"


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Lmprobe)
