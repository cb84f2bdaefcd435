"""Families: one table of places, and what is not in it is refused by name."""

from types import SimpleNamespace

import pytest

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.families import FAMILIES, Family, family_of
from hiddenlake.cache.sites import SITES

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def config(**values: object) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=64, num_attention_heads=4, intermediate_size=96, **values)


@EVERY
def test_a_family_has_every_site_but_that_of_experts(family: Family) -> None:
    missing = set(SITES) - set(family.sites)
    assert missing == ({"mlp_act"} if family.name in ("mixtral", "qwen3_moe", "olmoe") else set())
    assert set(family.sites) <= set(SITES) and len(set(family.sites)) == len(family.sites)


@EVERY
@pytest.mark.parametrize("vllm", [True, False])
def test_every_site_lies_at_the_input_or_output_of_a_module(family: Family, vllm: bool) -> None:
    for site in family.sites:
        path, end = family.locate(site, 2, vllm)
        assert end in ("input", "output") and path == path.strip(".")
        if SITES[site].layered:
            assert path == f"{family.layers}.2" or path.startswith(f"{family.layers}.2.")


def test_embed_is_the_input_of_block_0() -> None:
    for family in FAMILIES.values():
        assert family.locate("embed", 5, True) == family.locate("resid_pre", 0, True) == (f"{family.layers}.0", "input")


def test_vllm_names_mixtrals_experts_differently() -> None:
    mixtral = family_of(["MixtralForCausalLM"])
    assert mixtral.locate("mlp_out", 1, vllm=False) == ("model.layers.1.mlp", "output")
    assert mixtral.locate("mlp_out", 1, vllm=True) == ("model.layers.1.block_sparse_moe", "output")
    assert mixtral.locate("attn_z", 1, vllm=True) == ("model.layers.1.self_attn.o_proj", "input")


@pytest.mark.parametrize("architectures", [None, [], ["GPTNeoXForCausalLM"], ["Gemma3ForConditionalGeneration"]])
def test_a_family_that_is_not_in_the_table_is_refused_by_name(architectures: list[str] | None) -> None:
    with pytest.raises(UnknownNameError, match="expected one of LlamaForCausalLM") as error:
        family_of(architectures)
    assert (architectures or ["(none)"])[0] in str(error.value)


def test_widths() -> None:
    llama, gpt2, opt, olmoe = (
        family_of([name]) for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "OlmoeForCausalLM")
    )
    assert llama.widths(config()) == {"hidden": 64, "d_attn": 64, "d_mlp": 96}
    assert llama.widths(config(head_dim=32)) == {"hidden": 64, "d_attn": 128, "d_mlp": 96}
    assert llama.widths(config(head_dim=None))["d_attn"] == 64
    assert gpt2.widths(config(n_inner=None))["d_mlp"] == 256
    assert gpt2.widths(config(n_inner=100))["d_mlp"] == 100
    assert opt.widths(config(ffn_dim=48))["d_mlp"] == 48
    assert olmoe.widths(config()) == {"hidden": 64, "d_attn": 64}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("do_layer_norm_before", False, "do_layer_norm_before=True"),
        ("_remove_final_layer_norm", True, "_remove_final_layer_norm=False"),
        ("word_embed_proj_dim", 32, "word_embed_proj_dim=64"),
    ],
)
def test_a_variant_whose_sites_lie_elsewhere_is_refused(name: str, value: object, expected: str) -> None:
    """facebook/opt-350m is all but the second."""
    opt = family_of(["OPTForCausalLM"])
    usual = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": 64}
    opt.check_config(config(**usual))
    with pytest.raises(
        UnknownNameError, match=f"opt is not supported: its config has {name}={value}, expected {expected}"
    ):
        opt.check_config(config(**{**usual, name: value}))
