"""Sites: the places inside a transformer block that can be read, and the dialects that name them."""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.families import Family


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the forward pass.

    name : canonical name, as in the table of the README.
    width : kind of the last axis, which names its dimension in the store: `hidden`, `d_attn` (heads x head_dim)
        or `d_mlp`.
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
        Site("attn_z", "d_attn", True, "what the attention's output projection multiplies"),
        Site("attn_out", "hidden", True, "the attention module's output"),
        Site("attn_out_post", "hidden", True, "what attention adds to the stream: after a norm in some families"),
        Site("resid_mid", "hidden", True, "the residual stream between attention and MLP"),
        Site("mlp_in", "hidden", True, "the normed input of the MLP"),
        Site("mlp_act", "d_mlp", True, "what the MLP's down projection multiplies"),
        Site("mlp_out", "hidden", True, "the MLP module's output"),
        Site("mlp_out_post", "hidden", True, "what the MLP adds to the stream: after a norm in some families"),
        Site("resid_post", "hidden", True, "the residual stream leaving the block"),
        Site("final_norm", "hidden", False, "the output of the last norm"),
    )
}

# What stands behind `blocks.<layer>.` in TransformerLens. Its names are of places: the weight processing that it does by
# default (a norm's gain folded into what follows, centred outputs) changes values there.
_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
}

_NEAR_MISSES = {
    "hook_mlp_in": "TransformerLens' hook_mlp_in is the stream before the norm: use resid_mid, or mlp_in "
    "(ln2.hook_normalized), the stream after it",
    "hook_embed": "embed is what enters block 0, the token's embedding and its position's: no hook shows it",
    "hidden_states": "Hugging Face's hidden_states[k] is the stream after k blocks: "
    "use resid_post of layer k-1, or embed for k = 0",
}


def parse_site(name: str, family: Family | None = None) -> tuple[int | None, str]:
    """Turn a site's name in any dialect into (layer or None, canonical name).

    `mlp_out`, `blocks.13.hook_mlp_out`, `blocks.*.hook_mlp_out` and `model.layers.13.mlp` are all
    the site `mlp_out` of a Llama; the second and the last also name layer 13.

    family : of the model. Without one, names are refused that mean different sites in different families: Hugging
        Face's module paths, and hook_attn_out, hook_mlp_out and hook_embed of TransformerLens.

    Raises UnknownNameError for a name that maps to no site, or to one that the family does not have.
    """
    name = name.strip()
    found = (None, name) if name in SITES else _transformer_lens(name, family) or _hugging_face(name, family)
    if found is None:
        hint = next((text for part, text in _NEAR_MISSES.items() if part in name), None)
        raise UnknownNameError(
            f"unknown site {name!r}: expected one of {', '.join(SITES)}, a TransformerLens hook name "
            f"(blocks.*.hook_mlp_out) or, where the model is known, a Hugging Face module path "
            f"({family.layers if family else 'model.layers'}.*.mlp)" + (f"; {hint}" if hint else "")
        )
    if family is not None:
        family.check_sites([found[1]])
    return found


def _transformer_lens(name: str, family: Family | None) -> tuple[int | None, str] | None:
    if name == "ln_final.hook_normalized":
        return None, "final_norm"
    match = re.fullmatch(r"blocks\.(\d+|\*)\.(.+)", name)
    hook = match[2] if match else name
    if hook in ("hook_attn_out", "hook_mlp_out", "hook_embed") and family is None:
        raise UnknownNameError(
            f"{name!r} means different sites in different model families (hook_embed leaves out learned positions, the "
            f"others come after the norm that some families put there): name the site itself, one of {', '.join(SITES)}"
        )
    if name == "hook_embed" and not family.positions:
        return None, "embed"
    if match is None or hook not in _TRANSFORMER_LENS:
        return None
    normed = hook in ("hook_attn_out", "hook_mlp_out") and family.norms_outputs
    return _layer(match[1]), _TRANSFORMER_LENS[hook] + ("_post" if normed else "")


def _hugging_face(name: str, family: Family | None) -> tuple[int | None, str] | None:
    if family is None:
        return None
    if name.removesuffix(".output") == family.norm:
        return None, "final_norm"
    if name.removesuffix(".output") == family.embed and not family.positions:
        return None, "embed"
    match = re.fullmatch(re.escape(family.layers) + r"\.(\d+|\*)((?:\..+)?)", name)
    site = family.site_at(match[2]) if match else None
    return (_layer(match[1]), site) if site else None


def _layer(text: str) -> int | None:
    return None if text == "*" else int(text)


def parse_sites(names: Iterable[str], family: Family | None = None) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Parse several names into (canonical sites in the table's order, the layers they name or None).

    Names that carry a layer must name the same layers for every site that has layers, since a capture is a full
    layer x position box. A name without one means every layer, also beside others with one. `embed` is
    dropped: every capture holds it.
    """
    layers_of: dict[str, set[int]] = {}
    everywhere: set[str] = set()
    for name in names:
        layer, site = parse_site(name, family)
        layers_of.setdefault(site, set())
        if layer is not None:
            layers_of[site].add(layer)
        else:
            everywhere.add(site)
    layers_of.pop("embed", None)
    if not layers_of:
        raise UnknownNameError(
            f"no site was named but embed, which every capture holds: expected at least one of "
            f"{', '.join(n for n in SITES if n != 'embed')}"
        )
    sites = tuple(site for site in SITES if site in layers_of)
    named = {
        site: () if site in everywhere else tuple(sorted(layers))
        for site, layers in layers_of.items()
        if SITES[site].layered
    }
    if len(set(named.values())) > 1:
        found = "; ".join(f"{site}: {list(layers) or 'all'}" for site, layers in named.items())
        raise UnknownNameError(
            f"the sites name different layers ({found}), but a capture holds the same layers of every site: "
            f"name the same layers, or make one capture a set of layers"
        )
    return sites, next(iter(named.values()), ()) or None


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
