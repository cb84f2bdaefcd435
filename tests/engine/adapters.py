"""LoRA adapters with random weights, as PEFT saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .small_models import LINEAR

# Standard deviation of what an adapter adds to the weights of make_model, whose own is 0.08.
_SCALE = 0.04


def make_adapter(folder: Path, model: Path, rank: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Save an adapter for every linear layer of a model's blocks. Returns the weights with the adapter merged, by name."""
    torch.manual_seed(seed)
    alpha = 2 * rank
    tensors, merged = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not path.endswith(LINEAR):
            continue
        a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
        delta = alpha / rank * b @ a
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b * (_SCALE / delta.std())
        merged[name] = weight + delta * (_SCALE / delta.std())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged
