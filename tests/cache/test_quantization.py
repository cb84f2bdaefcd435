"""Which quantised checkpoints are let in: what their config.json says, field by field."""

import copy
import json
import shutil

import pytest

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.model import load_model
from hiddenlake.cache.quantization import SCHEMES, scheme_of

W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, "group_size": None,
                "observer": "mse",
            },
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
    "kv_cache_scheme": None, "global_compression_ratio": 1.5,
}  # fmt: skip
W4A16 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128, "actorder": "weight"}}
    },
}  # fmt: skip
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "true_sequential": True,
    "damp_percent": 0.01, "static_groups": False,
}  # fmt: skip

LET_IN = {
    "compressed-tensors W8A8": W8A8, "compressed-tensors W4A16": W4A16, "AWQ W4A16": AWQ, "GPTQ W4A16": GPTQ,
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_tested_has_a_name(name):
    assert scheme_of(LET_IN[name]) == name


def test_several_groups_of_layers_may_be_of_one_scheme():
    several = changed(W4A16, "config_groups.group_1", W4A16["config_groups"]["group_0"] | {"targets": ["Linear"]})
    assert scheme_of(several) == "compressed-tensors W4A16"


def changed(config, path, value):
    config = copy.deepcopy(config)
    *parts, last = path.split(".")
    place = config
    for part in parts:
        place = place[part]
    place[last] = value
    return config


GROUP = "config_groups.group_0"
OTHER_GROUP = copy.deepcopy(W8A8["config_groups"]["group_0"])
OTHER_GROUP["weights"]["num_bits"] = 4


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (W8A8, f"{GROUP}.weights.type", "float"),
        (W8A8, f"{GROUP}.weights.strategy", "tensor"),
        (W8A8, f"{GROUP}.weights.symmetric", False),
        (W8A8, f"{GROUP}.input_activations.dynamic", False),
        (W8A8, f"{GROUP}.input_activations.symmetric", False),
        (W8A8, f"{GROUP}.input_activations.strategy", "tensor"),
        (W8A8, f"{GROUP}.output_activations", {"num_bits": 8}),
        (W8A8, f"{GROUP}.targets", ["Linear", "Embedding"]),
        (W8A8, "config_groups.group_1", OTHER_GROUP),
        (W8A8, "kv_cache_scheme", {"num_bits": 8, "type": "float"}),
        (W8A8, "sparsity_config", {"format": "sparse-24-bitmask"}),
        (W8A8, "transform_config", {"config_groups": {"R1": {}}}),
        (W8A8, "format", "float-quantized"),
        (W8A8, "config_groups", {}),
        (W4A16, f"{GROUP}.weights.num_bits", 8),
        (W4A16, f"{GROUP}.weights.actorder", "group"),
        (W4A16, f"{GROUP}.weights.strategy", "block"),
        (W4A16, f"{GROUP}.input_activations", {"num_bits": 8, "strategy": "token", "dynamic": True}),
        (AWQ, "bits", 8),
        (AWQ, "version", "gemv"),
        (AWQ, "zero_point", False),
        (GPTQ, "bits", 8),
        (GPTQ, "sym", False),
        (GPTQ, "desc_act", True),
        (GPTQ, "dynamic", {"-:.*down_proj": {}}),
        (GPTQ, "checkpoint_format", "gptq_v2"),
        (GPTQ, "lm_head", True),
        (AWQ, "quant_method", "bitsandbytes"),
        (W8A8, "quant_method", "fp8"),
    ],
)
def test_what_was_not_tested_is_refused_by_its_field(config, path, value):
    with pytest.raises(UnknownNameError) as refused:
        scheme_of(changed(config, path, value))
    expected = "config_groups.group_1.weights.num_bits=4" if value is OTHER_GROUP else f"{path}={value}"
    assert str(refused.value).startswith(f"quantised weights with {expected} were not tested")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_both_keys_of_a_config_are_read(key, tiny_model, tmp_path):
    """vLLM takes a checkpoint for quantised by either."""
    shutil.copytree(tiny_model, tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: W8A8}))
    assert load_model(tmp_path / "x", "bfloat16").quantization == "compressed-tensors W8A8"
    assert load_model(tiny_model).quantization is None
