"""Quantised checkpoints, made by hand of small models, and the weights that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .small_models import LINEAR

GROUP = 32

Tensors = dict[str, torch.Tensor]


def _pack(numbers: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """(..., n), from 0 to 15, as (..., n / 8) int32. order : which of eight numbers comes first, from the lowest bits on."""
    eights = numbers.long().unflatten(-1, (-1, 8))[..., order]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).int()


def _symmetric(weight: torch.Tensor, group: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers (out, group, n) from -most - 1 to most, scales (out, group, 1)), in bfloat16's values."""
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True) / (most + 0.5)).bfloat16().float()
    return (groups / scales).round().clamp(-most - 1, most), scales


def _asymmetric(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(numbers (out, group, n) from 0 to 15, scales (out, group, 1), zero points (out, group, 1))."""
    groups = weight.unflatten(1, (-1, group))
    least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scales = ((most - least) / 15).bfloat16().float()
    zeros = (-least / scales).round().clamp(0, 15)
    return (groups / scales + zeros).round().clamp(0, 15), scales, zeros


def _w8a8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    # coarser than it need be, so that rows differ clearly from those of the weights that were rounded
    numbers, scales = _symmetric(weight, weight.shape[1], 7)
    stored = {"weight": numbers.flatten(1).to(torch.int8), "weight_scale": scales[:, 0].bfloat16()}
    return stored, (numbers * scales).flatten(1)


def _w4a16(weight: torch.Tensor, group: int = GROUP) -> tuple[Tensors, torch.Tensor]:
    numbers, scales = _symmetric(weight, group, 7)
    stored = {
        "weight_packed": _pack(numbers.flatten(1) + 8), "weight_scale": scales[..., 0].bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return stored, (numbers * scales).flatten(1)


def _w4a16_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return _w4a16(weight, weight.shape[1])


def _w4a16_asymmetric(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales, zeros = _asymmetric(weight, GROUP)
    stored = {
        "weight_packed": _pack(numbers.flatten(1)), "weight_scale": scales[..., 0].bfloat16(),
        "weight_zero_point": _pack(zeros[..., 0].T).T, "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return stored, ((numbers - zeros) * scales).flatten(1)


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales, zeros = _asymmetric(weight, GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": _pack(numbers.flatten(1).T, order), "qzeros": _pack(zeros[..., 0].T, order),
        "scales": scales[..., 0].T.half(),
    }  # fmt: skip
    return stored, ((numbers - zeros) * scales).flatten(1)


def _gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales = _symmetric(weight, GROUP, 7)
    groups = weight.shape[1] // GROUP
    stored = {
        "qweight": _pack(numbers.flatten(1) + 8).T, "scales": scales[..., 0].T.half(),
        "qzeros": _pack(torch.full((groups, len(weight)), 7)), "g_idx": torch.arange(weight.shape[1]).int() // GROUP,
    }  # fmt: skip
    return stored, (numbers * scales).flatten(1)


def _compressed(form: str, bits: int, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

# kind -> (how a weight is stored and what it stands for, quantization_config)
KINDS: dict[str, tuple[Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "W8A8": (_w8a8, _compressed("int-quantized", 8, _TOKEN, strategy="channel")),
    "W4A16": (_w4a16, _compressed("pack-quantized", 4, strategy="group", group_size=GROUP, actorder="weight")),
    "W4A16 channel": (_w4a16_channel, _compressed("pack-quantized", 4, strategy="channel")),
    "W4A16 asymmetric": (
        _w4a16_asymmetric, _compressed("pack-quantized", 4, strategy="group", group_size=GROUP, symmetric=False)
    ),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
}  # fmt: skip


def quantize(kind: str, model: Path, folder: Path) -> Tensors:
    """Save a model with quantised weights in its blocks, and bfloat16 elsewhere. Returns what they stand for, by name."""
    store, config = KINDS[kind]
    shutil.copytree(model, folder)
    saved, meant = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not path.endswith(LINEAR):
            saved[name] = weight.bfloat16()
            meant[name] = saved[name].float()
            continue
        tensors, meant[name] = store(weight)
        saved |= {f"{path}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16", "quantization_config": config}))
    return meant


def rounded(values: torch.Tensor) -> torch.Tensor:
    """What W8A8 computes with: each token's values as multiples of a 127th of the largest."""
    scales = values.abs().amax(-1, keepdim=True) / 127
    return (values / scales).round() * scales
