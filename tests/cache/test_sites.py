"""Sites: every dialect means one thing, and what means nothing is refused with what would."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.families import FAMILIES, Family, family_of
from hiddenlake.cache.sites import SITES, parse_layers, parse_site, parse_sites

LLAMA, GEMMA, GPT2, OPT, MIXTRAL = (
    family_of([name])
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "MixtralForCausalLM")
)
TRANSFORMER_LENS = {
    "resid_pre": ["blocks.{}.hook_resid_pre"],
    "attn_z": ["blocks.{}.attn.hook_z"],
    "attn_out": ["blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"],
    "resid_mid": ["blocks.{}.hook_resid_mid"],
    "mlp_in": ["blocks.{}.ln2.hook_normalized"],
    "mlp_act": ["blocks.{}.mlp.hook_post"],
    "mlp_out": ["blocks.{}.hook_mlp_out", "blocks.{}.mlp.hook_out"],
    "resid_post": ["blocks.{}.hook_resid_post", "blocks.{}.hook_out"],
}
HUGGING_FACE = {
    "resid_pre": ["model.layers.{}.input"],
    "attn_z": ["model.layers.{}.self_attn.o_proj.input"],
    "attn_out": ["model.layers.{}.self_attn", "model.layers.{}.self_attn.output"],
    "resid_mid": ["model.layers.{}.post_attention_layernorm.input"],
    "mlp_in": ["model.layers.{}.mlp.input"],
    "mlp_act": ["model.layers.{}.mlp.down_proj.input"],
    "mlp_out": ["model.layers.{}.mlp", "model.layers.{}.mlp.output"],
    "resid_post": ["model.layers.{}", "model.layers.{}.output"],
}
DIALECTS = [
    (spelling, site)
    for dialect in (TRANSFORMER_LENS, HUGGING_FACE)
    for site, spellings in dialect.items()
    for spelling in spellings
]
# Names that say which site only together with the family.
OF_A_FAMILY = [
    (GEMMA, "blocks.{}.hook_attn_out", "attn_out_post"),
    (GEMMA, "blocks.{}.attn.hook_out", "attn_out"),
    (GEMMA, "blocks.{}.hook_mlp_out", "mlp_out_post"),
    (GEMMA, "model.layers.{}.post_attention_layernorm", "attn_out_post"),
    (GEMMA, "model.layers.{}.pre_feedforward_layernorm.input", "resid_mid"),
    (GEMMA, "model.layers.{}.post_feedforward_layernorm.output", "mlp_out_post"),
    (GEMMA, "model.layers.{}.mlp", "mlp_out"),
    (GPT2, "transformer.h.{}.input", "resid_pre"),
    (GPT2, "transformer.h.{}.attn.c_proj.input", "attn_z"),
    (GPT2, "transformer.h.{}.ln_2.input", "resid_mid"),
    (GPT2, "transformer.h.{}.mlp.c_proj.input", "mlp_act"),
    (GPT2, "blocks.{}.hook_mlp_out", "mlp_out"),
    (OPT, "model.decoder.layers.{}.fc2.input", "mlp_act"),
    (OPT, "model.decoder.layers.{}.fc2", "mlp_out"),
    (MIXTRAL, "model.layers.{}.mlp", "mlp_out"),
]


@pytest.mark.parametrize(("spelling", "site"), DIALECTS)
@given(layer=st.integers(0, 200))
def test_dialect_with_layer(spelling: str, site: str, layer: int) -> None:
    assert parse_site(spelling.format(layer), LLAMA) == (layer, site)


@pytest.mark.parametrize(("spelling", "site"), DIALECTS)
def test_dialect_with_any_layer(spelling: str, site: str) -> None:
    assert parse_site(spelling.format("*"), LLAMA) == (None, site)


@pytest.mark.parametrize(("family", "spelling", "site"), OF_A_FAMILY)
def test_dialect_of_a_family(family: Family, spelling: str, site: str) -> None:
    assert parse_site(spelling.format(5), family) == (5, site)


@pytest.mark.parametrize(("spelling", "site"), DIALECTS)
def test_without_a_family_a_name_means_one_site_or_is_refused(spelling: str, site: str) -> None:
    ambiguous = spelling.startswith("model.") or spelling.endswith((".hook_attn_out", ".hook_mlp_out"))
    if ambiguous:
        with pytest.raises(UnknownNameError, match="mlp_out"):
            parse_site(spelling.format(5))
    else:
        assert parse_site(spelling.format(5)) == (5, site)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_module_path_names_its_site(family: Family) -> None:
    """What is added to the stream has no path of its own where no norm comes before."""
    for site, path in family.block.items():
        expected = site if family.norms_outputs else site.removesuffix("_post") if site.endswith("out_post") else site
        assert parse_site(f"{family.layers}.7{'' if path[0] == '.' else '.'}{path}", family) == (7, expected)


@pytest.mark.parametrize("name", ["embed", "hook_embed", "model.embed_tokens", "model.embed_tokens.output"])
def test_embed_has_no_layer(name: str) -> None:
    assert parse_site(name, LLAMA) == (None, "embed")
    assert not SITES["embed"].layered


@pytest.mark.parametrize("name", ["hook_embed", "transformer.wte"])
def test_a_token_embedding_without_its_position_is_not_embed(name: str) -> None:
    with pytest.raises(UnknownNameError):
        parse_site(name, GPT2)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (LLAMA, "ln_final.hook_normalized"),
        (LLAMA, "model.norm"),
        (GPT2, "transformer.ln_f.output"),
        (None, "final_norm"),
    ],
)
def test_final_norm_has_no_layer(family: Family | None, name: str) -> None:
    assert parse_site(name, family) == (None, "final_norm")


@pytest.mark.parametrize("name", SITES)
def test_canonical_name(name: str) -> None:
    assert parse_site(f" {name} ") == (None, name)


def test_every_site_with_layers_has_both_dialects() -> None:
    layered = {name for name, site in SITES.items() if site.layered and not name.endswith("_out_post")}
    assert layered == set(TRANSFORMER_LENS) == set(HUGGING_FACE)


@pytest.mark.parametrize("name", ["mlp_act", "blocks.3.mlp.hook_post"])
def test_a_site_that_the_family_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="mixtral has no mlp_act: its MLP is a set of experts.* it has embed"):
        parse_site(name, MIXTRAL)
    with pytest.raises(UnknownNameError, match="mixtral has no mlp_act"):
        parse_sites(["mlp_out", name], MIXTRAL)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "MLP_OUT",
        "mlp_outt",
        "blocks.hook_mlp_out",
        "blocks.-1.hook_mlp_out",
        "blocks.3.hook_mlp_out.x",
        "xblocks.3.hook_mlp_out",
        "hook_mlp_post",
        "blocks.3.mlp.hook_pre",
        "ln_final.hook_scale",
        "model.layers.3.mlp.down_proj",
        "model.layers.3.post_attention_layernorm",
        "transformer.h.3.mlp",
        "model.layers.x.mlp",
        "model_layers_3",
    ],
)
def test_unknown_site_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match="resid_post") as error:
        parse_site(name, LLAMA)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("blocks.3.hook_mlp_in", "before the norm"), ("hidden_states", "layer k-1")]
)
def test_near_miss_is_explained(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        parse_site(name)


def test_sites_come_in_the_order_of_the_table() -> None:
    assert parse_sites(["resid_post", "mlp_out"]) == (("mlp_out", "resid_post"), None)


def test_sites_with_layers() -> None:
    names = ["blocks.7.hook_mlp_out", "model.layers.3.mlp", "blocks.3.hook_resid_post", "model.layers.7"]
    assert parse_sites(names, LLAMA) == (("mlp_out", "resid_post"), (3, 7))


def test_embed_is_held_by_every_capture() -> None:
    assert parse_sites(["embed", "mlp_out"]) == (("mlp_out",), None)


def test_final_norm_alone_or_beside_others() -> None:
    assert parse_sites(["final_norm"]) == (("final_norm",), None)
    assert parse_sites(["ln_final.hook_normalized", "embed"]) == (("final_norm",), None)
    assert parse_sites(["final_norm", "blocks.3.hook_resid_post"]) == (("resid_post", "final_norm"), (3,))


@pytest.mark.parametrize(
    "names", [["mlp_out", "blocks.3.hook_mlp_out"], ["blocks.3.hook_mlp_out", "blocks.*.hook_mlp_out"]]
)
def test_every_layer_is_not_narrowed_by_a_name_with_a_layer(names: list[str]) -> None:
    assert parse_sites(names, LLAMA) == (("mlp_out",), None)


@pytest.mark.parametrize("names", [[], ["embed"]])
def test_nothing_but_embed_is_refused(names: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="at least one of"):
        parse_sites(names)


@pytest.mark.parametrize(
    "names", [["blocks.3.hook_mlp_out", "blocks.4.hook_resid_post"], ["blocks.3.hook_mlp_out", "resid_post"]]
)
def test_different_layers_are_refused(names: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="different layers"):
        parse_sites(names, LLAMA)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", tuple(range(30))),
        ("13", (13,)),
        ("0,5,10-12", (0, 5, 10, 11, 12)),
        (" 12 - 12 , 3", (3, 12)),
        ("-1", (29,)),
        ("-30,0", (0,)),
        ([3, -1, 3], (3, 29)),
        (np.array([2, 1]), (1, 2)),
    ],
)
def test_layers(text: str | list[int], layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 30) == layers


@given(st.sets(st.integers(-30, 29), min_size=1))
def test_layers_as_text_and_as_integers_agree(layers: set[int]) -> None:
    parsed = parse_layers(layers, 30)
    assert parsed == parse_layers(",".join(map(str, layers)), 30)
    assert parsed == tuple(sorted({range(30)[layer] for layer in layers}))


@pytest.mark.parametrize("text", ["", "x", "1.5", "1-", "3-2", "0-30", "0-999999999999", "30", "-31", "1,,2", [], [30]])
def test_layers_that_do_not_exist_are_refused(text: str | list[int]) -> None:
    with pytest.raises(UnknownNameError):
        parse_layers(text, 30)


def test_a_layer_is_not_rounded() -> None:
    with pytest.raises(TypeError):
        parse_layers([1.5], 30)  # type: ignore[list-item]
