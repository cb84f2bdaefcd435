"""SAELens's cache: CacheActivationsRunner without its model, one run a layer, read back by its ActivationsStore."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore
from serve import serve
from store_arm import StoreArm
from store_rows import Want

_BATCH = 64

# HF datasets have no bfloat16; this is the runner's default, and holds it exactly.
_DTYPE = "float32"


class _Batches:
    """What the runner asks its model's store for: the next batch of one layer."""

    def __init__(self, arm: "SaeLens", layer: int) -> None:
        self._arm, self._layer, self._at = arm, layer, 0

    def get_raw_llm_batch(self) -> tuple[torch.Tensor, None]:
        samples = range(self._at, self._at + _BATCH)
        self._at += _BATCH
        rows = np.stack([self._arm.rows.sample(i)[self._layer] for i in samples])
        return torch.from_numpy(rows).view(torch.bfloat16).float().flatten(0, 1), None


class _Runner(CacheActivationsRunner):
    """The runner, its saving as it is, without the model that its constructor loads."""

    def __init__(self, cfg: CacheActivationsRunnerConfig, batches: _Batches) -> None:
        from datasets import Array2D, Features

        self.cfg, self.activations_store, self.context_size = cfg, batches, cfg.context_size
        self.features = Features({cfg.hook_name: Array2D(shape=(cfg.context_size, cfg.d_in), dtype=cfg.dtype)})


class SaeLens(StoreArm):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        if self.shape.samples % _BATCH:
            raise ValueError(f"{self.shape.samples} samples: expected a multiple of {_BATCH}")
        self._stores: dict[int, ActivationsStore] = {}

    def write(self) -> None:
        s = self.shape
        self.folder.mkdir()
        for layer in range(s.layers):
            cfg = CacheActivationsRunnerConfig(
                dataset_path="synthetic", model_name="synthetic", model_batch_size=_BATCH, hook_name=_hook(layer),
                d_in=s.hidden, training_tokens=s.samples * s.positions, context_size=s.positions, shuffle=False,
                new_cached_activations_path=str(self._path(layer)), dtype=_DTYPE, device="cpu",
                # a layer is one buffer; half a token more, for the division of floats
                buffer_size_gb=(s.samples * s.positions + 0.5) * s.hidden * 4 / 1e9,
            )  # fmt: skip
            _Runner(cfg, _Batches(self, layer)).run()

    def _path(self, layer: int) -> Path:
        return self.folder / _hook(layer)

    def close(self) -> None:
        self._stores.clear()
        gc.collect()  # what maps the files is held in cycles, and pages that are mapped stay

    def aim(self, want: Want, way: str) -> None:
        for layer in want.layers:
            if layer not in self._stores:
                self._stores[layer] = ActivationsStore(
                    None, None, streaming=False, hook_name=_hook(layer), hook_head_index=None, d_in=self.shape.hidden,
                    context_size=self.shape.positions, n_batches_in_buffer=1, train_batch_size_tokens=1,
                    total_training_tokens=self.shape.samples * self.shape.positions, prepend_bos=False,
                    store_batch_size_prompts=_BATCH, normalize_activations="none", device=torch.device("cpu"),
                    dtype=_DTYPE, cached_activations_path=str(self._path(layer)),
                )  # fmt: skip

    def read(self, want: Want, way: str) -> torch.Tensor:
        positions = slice(want.positions.start, want.positions.stop)
        return torch.stack([self._layer(layer, want, positions) for layer in want.layers])

    def _layer(self, layer: int, want: Want, positions: slice) -> torch.Tensor:
        """(sample, position, hidden)"""
        store, s = self._stores[layer], self.shape
        if len(want.samples) < s.samples:
            found = store.cached_activation_dataset[list(want.samples)][_hook(layer)]
            return found[:, positions].clone()
        store.current_row_idx = 0
        batches = [store.get_raw_llm_batch()[0].unflatten(0, (_BATCH, -1)) for _ in range(s.samples // _BATCH)]
        return torch.cat([batch[:, positions] for batch in batches])

    def bits(self, result: torch.Tensor, want: Want) -> np.ndarray:
        return result.bfloat16().view(torch.uint16).numpy().swapaxes(1, 2)


def _hook(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(SaeLens)
