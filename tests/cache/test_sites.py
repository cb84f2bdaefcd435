"""Sites: every dialect means one thing, and what means nothing is refused with what would."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.sites import SITES, parse_layers, parse_site, parse_sites

TRANSFORMER_LENS = {
    "resid_pre": ["blocks.{}.hook_resid_pre"],
    "attn_out": ["blocks.{}.hook_attn_out", "blocks.{}.attn.hook_out"],
    "mlp_in": ["blocks.{}.ln2.hook_normalized"],
    "mlp_out": ["blocks.{}.hook_mlp_out", "blocks.{}.mlp.hook_out"],
    "resid_post": ["blocks.{}.hook_resid_post", "blocks.{}.hook_out"],
}
HUGGING_FACE = {
    "resid_pre": ["model.layers.{}.input"],
    "attn_out": ["model.layers.{}.self_attn", "model.layers.{}.self_attn.output"],
    "mlp_in": ["model.layers.{}.mlp.input"],
    "mlp_out": ["model.layers.{}.mlp", "model.layers.{}.mlp.output"],
    "resid_post": ["model.layers.{}", "model.layers.{}.output"],
}
DIALECTS = [
    (spelling, site)
    for dialect in (TRANSFORMER_LENS, HUGGING_FACE)
    for site, spellings in dialect.items()
    for spelling in spellings
]


@pytest.mark.parametrize(("spelling", "site"), DIALECTS)
@given(layer=st.integers(0, 200))
def test_dialect_with_layer(spelling: str, site: str, layer: int) -> None:
    assert parse_site(spelling.format(layer)) == (layer, site)


@pytest.mark.parametrize(("spelling", "site"), DIALECTS)
def test_dialect_with_any_layer(spelling: str, site: str) -> None:
    assert parse_site(spelling.format("*")) == (None, site)


@pytest.mark.parametrize("name", ["embed", "hook_embed", "model.embed_tokens", "model.embed_tokens.output"])
def test_embed_has_no_layer(name: str) -> None:
    assert parse_site(name) == (None, "embed")
    assert not SITES["embed"].layered


@pytest.mark.parametrize("name", SITES)
def test_canonical_name(name: str) -> None:
    assert parse_site(f" {name} ") == (None, name)


def test_every_site_with_layers_has_both_dialects() -> None:
    layered = {name for name, site in SITES.items() if site.layered}
    assert layered == set(TRANSFORMER_LENS) == set(HUGGING_FACE)


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
        "blocks.3.mlp.hook_post",
        "blocks.3.hook_resid_mid",
        "model.layers.3.mlp.down_proj",
        "model.layers.x.mlp",
        "model_layers_3",
    ],
)
def test_unknown_site_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match="resid_post") as error:
        parse_site(name)
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
    assert parse_sites(names) == (("mlp_out", "resid_post"), (3, 7))


def test_embed_is_held_by_every_capture() -> None:
    assert parse_sites(["embed", "mlp_out"]) == (("mlp_out",), None)


@pytest.mark.parametrize(
    "names", [["mlp_out", "blocks.3.hook_mlp_out"], ["blocks.3.hook_mlp_out", "blocks.*.hook_mlp_out"]]
)
def test_every_layer_is_not_narrowed_by_a_name_with_a_layer(names: list[str]) -> None:
    assert parse_sites(names) == (("mlp_out",), None)


@pytest.mark.parametrize("names", [[], ["embed"]])
def test_no_layered_site_is_refused(names: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="at least one of"):
        parse_sites(names)


@pytest.mark.parametrize(
    "names", [["blocks.3.hook_mlp_out", "blocks.4.hook_resid_post"], ["blocks.3.hook_mlp_out", "resid_post"]]
)
def test_different_layers_are_refused(names: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="different layers"):
        parse_sites(names)


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
