"""LoRA adapters with random weights, as PEFT saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Linear layers of the blocks, by how their names end.
_LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj", "out_proj", "fc1", "fc2",
)  # fmt: skip

# Standard deviation of what an adapter adds to the weights of make_model, whose own is 0.08.
_SCALE = 0.04


def make_adapter(folder: Path, model: Path, rank: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Save an adapter for every linear layer of a model's blocks. Returns what it adds to each weight, by its name."""
    torch.manual_seed(seed)
    alpha = 2 * rank
    tensors, added = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not path.endswith(_LINEAR):
            continue
        a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
        delta = alpha / rank * b @ a
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b * (_SCALE / delta.std())
        added[name] = delta * (_SCALE / delta.std())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added
