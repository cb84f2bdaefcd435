"""Sites: the places inside a transformer block that can be read, and the dialects that name them."""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hiddenlake.cache.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the forward pass.

    name : canonical name, as in the table of the README.
    width : kind of the last axis, which names its dimension in the store: `hidden`, `attn_z` (heads x head_dim)
        or `mlp_act` (d_ff).
    layered : False for what exists once a model (`embed`, `final_norm`).
    meaning : one line for `hiddenlake info` and for errors.
    """

    name: str
    width: str
    layered: bool
    meaning: str


SITES = {
    site.name: site
    for site in (
        Site("embed", "hidden", False, "the input of block 0"),
        Site("resid_pre", "hidden", True, "the residual stream entering the block"),
        Site("attn_z", "attn_z", True, "what the attention's output projection multiplies"),
        Site("attn_out", "hidden", True, "the attention module's output"),
        Site("attn_out_post", "hidden", True, "what attention adds to the stream, after the norm that some families put there"),
        Site("resid_mid", "hidden", True, "the residual stream between attention and MLP"),
        Site("mlp_in", "hidden", True, "the normed input of the MLP"),
        Site("mlp_act", "mlp_act", True, "what the MLP's down projection multiplies"),
        Site("mlp_out", "hidden", True, "the MLP module's output"),
        Site("mlp_out_post", "hidden", True, "what the MLP adds to the stream, after the norm that some families put there"),
        Site("resid_post", "hidden", True, "the residual stream leaving the block"),
        Site("final_norm", "hidden", False, "the output of the last norm"),
    )
}

# `*` stands for any layer. TransformerLens says blocks.3.hook_mlp_out, Hugging Face model.layers.3.mlp.
_DIALECTS = (
    # TransformerLens
    (r"hook_embed", "embed"),
    (r"blocks\.(\d+|\*)\.hook_resid_pre", "resid_pre"),
    (r"blocks\.(\d+|\*)\.hook_attn_out", "attn_out"),
    (r"blocks\.(\d+|\*)\.attn\.hook_out", "attn_out"),
    (r"blocks\.(\d+|\*)\.ln2\.hook_normalized", "mlp_in"),
    (r"blocks\.(\d+|\*)\.hook_mlp_out", "mlp_out"),
    (r"blocks\.(\d+|\*)\.mlp\.hook_out", "mlp_out"),
    (r"blocks\.(\d+|\*)\.hook_(?:resid_post|out)", "resid_post"),
    # Hugging Face module paths
    (r"model\.embed_tokens(?:\.output)?", "embed"),
    (r"model\.layers\.(\d+|\*)\.input", "resid_pre"),
    (r"model\.layers\.(\d+|\*)\.self_attn(?:\.output)?", "attn_out"),
    (r"model\.layers\.(\d+|\*)\.mlp\.input", "mlp_in"),
    (r"model\.layers\.(\d+|\*)\.mlp(?:\.output)?", "mlp_out"),
    (r"model\.layers\.(\d+|\*)(?:\.output)?", "resid_post"),
)

_NEAR_MISSES = {
    "hook_mlp_in": "TransformerLens' hook_mlp_in is the stream before the norm, which is not captured: "
    "use mlp_in (ln2.hook_normalized), the stream after it",
    "hidden_states": "Hugging Face's hidden_states[k] is the stream after k blocks: "
    "use resid_post of layer k-1, or embed for k = 0",
}


def parse_site(name: str) -> tuple[int | None, str]:
    """Turn a site's name in any dialect into (layer or None, canonical name).

    `mlp_out`, `blocks.13.hook_mlp_out`, `blocks.*.hook_mlp_out` and `model.layers.13.mlp` are all
    the site `mlp_out`; the second and the last also name layer 13.

    Raises UnknownNameError for a name that maps to no site.
    """
    name = name.strip()
    if name in SITES:
        return None, name
    for pattern, site in _DIALECTS:
        if match := re.fullmatch(pattern, name):
            layer = match.group(1) if match.groups() else None
            return (int(layer) if layer not in (None, "*") else None), site
    hint = next((text for part, text in _NEAR_MISSES.items() if part in name), None)
    raise UnknownNameError(
        f"unknown site {name!r}: expected one of {', '.join(SITES)}, a TransformerLens hook name "
        f"(blocks.*.hook_mlp_out) or a Hugging Face module path (model.layers.*.mlp)" + (f"; {hint}" if hint else "")
    )


def parse_sites(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Parse several names into (canonical sites in the table's order, the layers they name or None).

    Names that carry a layer must name the same layers for every site, since a capture is a full
    layer x position box. A name without one means every layer, also beside others with one. `embed` is
    dropped: every capture holds it.
    """
    layers_of: dict[str, set[int]] = {}
    everywhere: set[str] = set()
    for name in names:
        layer, site = parse_site(name)
        layers_of.setdefault(site, set())
        if layer is not None:
            layers_of[site].add(layer)
        else:
            everywhere.add(site)
    layers_of.pop("embed", None)
    if not layers_of:
        raise UnknownNameError(
            f"no site with layers was named: expected at least one of {', '.join(n for n in SITES if n != 'embed')}"
        )
    named = {site: () if site in everywhere else tuple(sorted(layers)) for site, layers in layers_of.items()}
    if len(set(named.values())) > 1:
        found = "; ".join(f"{site}: {list(layers) or 'all'}" for site, layers in named.items())
        raise UnknownNameError(
            f"the sites name different layers ({found}), but a capture holds the same layers of every site: "
            f"name the same layers, or make one capture a set of layers"
        )
    sites = tuple(site for site in SITES if site in named)
    return sites, next(iter(named.values())) or None


def parse_layers(text: str | Iterable[int], n_layers: int) -> tuple[int, ...]:
    """Layers as sorted 0-based block indices: `all`, `0,5,10-12`, `-1` (the last), or integers.

    Raises UnknownNameError for a layer that the model does not have.
    """
    if isinstance(text, str):
        text = text.strip()
        if text == "all":
            return tuple(range(n_layers))
        layers: list[int] = []
        for part in text.split(","):
            if match := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part):
                first, last = int(match[1]), int(match[2])
                if not first <= last < n_layers:
                    raise UnknownNameError(
                        f"layers {part.strip()!r} do not exist: expected first-last, from 0 to {n_layers - 1}"
                    )
                layers += range(first, last + 1)
            elif re.fullmatch(r"\s*-?\d+\s*", part):
                layers.append(int(part))
            else:
                raise UnknownNameError(f"unknown layers {part!r}: expected `all`, `13`, `0,5,10-12` or `-1`")
    else:
        layers = [operator.index(layer) for layer in text]
    resolved = []
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise UnknownNameError(
                f"layer {layer} does not exist: the model has {n_layers} layers, 0 to {n_layers - 1}"
            )
        resolved.append(layer % n_layers)
    if not resolved:
        raise UnknownNameError("no layer was named: expected `all`, `13`, `0,5,10-12` or `-1`")
    return tuple(sorted(set(resolved)))
