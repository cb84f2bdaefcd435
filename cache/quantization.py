"""Quantisation: which quantised checkpoints were tested, and what the value identity calls them."""

from collections.abc import Iterator, Mapping
from typing import Any

from hiddenlake.cache.errors import UnknownNameError

_INT = {
    "type": (None, "int"),
    "dynamic": (None, False),
    "block_structure": None,
    "actorder": (None, "static", "weight"),
}
_PER_TOKEN = {
    "num_bits": (None, 8), "type": (None, "int"), "symmetric": (None, True), "dynamic": True, "strategy": "token",
}  # fmt: skip


def _compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {
            "*": {
                "targets": ["Linear"],
                "format": (None, form),
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "kv_cache_scheme": None,
        "sparsity_config": (None, {}),
        "transform_config": (None, {}),
    }


# Name -> what a checkpoint's quantization_config must say: a value, one of several (None: nothing), or a part with
# fields of its own, "*" for each of them whatever its name. Other fields matter to none of these.
SCHEMES = {
    "compressed-tensors W8A8": _compressed(
        "int-quantized", {"num_bits": (None, 8), "symmetric": (None, True), "strategy": "channel", **_INT}, _PER_TOKEN
    ),
    "compressed-tensors W4A16": _compressed(
        "pack-quantized", {"num_bits": 4, "symmetric": (None, True, False), "strategy": ("group", "channel"), **_INT}, None
    ),
    "AWQ W4A16": {"quant_method": "awq", "bits": 4, "zero_point": True, "version": (None, "gemm"), "lm_head": (None, False)},
    "GPTQ W4A16": {
        "quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "dynamic": (None, {}), "lm_head": (None, False),
        "checkpoint_format": (None, "gptq"),
    },
}  # fmt: skip


def scheme_of(config: Mapping[str, Any]) -> str:
    """The name of a checkpoint's quantisation.

    config : its quantization_config.

    Raises UnknownNameError for one that was not tested, naming what differs from the tested one that is most like it.
    """
    faults = {name: list(_faults(config, tested)) for name, tested in SCHEMES.items()}
    method = config.get("quant_method", "unknown")
    nearest = min(faults, key=lambda name: (SCHEMES[name]["quant_method"] != method, len(faults[name])))
    if not faults[nearest]:
        return nearest
    raise UnknownNameError(
        f"quantised weights with {faults[nearest][0]} were not tested with capture: expected one of {', '.join(SCHEMES)}, or "
        f"the unquantised checkpoint"
    )


def _faults(found: Any, tested: Any, path: str = "") -> Iterator[str]:
    """`<field>=<value>` of what is found and was not tested."""
    if isinstance(tested, Mapping) and isinstance(found, Mapping) and found:
        for name, value in tested.items():
            for field in found if name == "*" else (name,):
                yield from _faults(found.get(field), value, f"{path}.{field}".lstrip("."))
    elif found not in (tested if isinstance(tested, tuple) else (tested,)):
        yield f"{path}={found}"
