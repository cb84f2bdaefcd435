"""Model families: where the sites lie in each architecture. What is not in the table is refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hiddenlake.cache.errors import UnknownNameError

_BLOCK = {
    "resid_pre": ".input",
    "attn_z": "self_attn.o_proj.input",
    "attn_out": "self_attn.output",
    "attn_out_post": "self_attn.output",
    "resid_mid": "post_attention_layernorm.input",
    "mlp_in": "mlp.input",
    "mlp_act": "mlp.down_proj.input",
    "mlp_out": "mlp.output",
    "mlp_out_post": "mlp.output",
    "resid_post": ".output",
}
_GEMMA = _BLOCK | {
    "attn_out_post": "post_attention_layernorm.output",
    "resid_mid": "pre_feedforward_layernorm.input",
    "mlp_out_post": "post_feedforward_layernorm.output",
}
_EXPERTS = {site: at for site, at in _BLOCK.items() if site != "mlp_act"}
_GPT2 = _BLOCK | {
    "attn_z": "attn.c_proj.input",
    "attn_out": "attn.output",
    "attn_out_post": "attn.output",
    "resid_mid": "ln_2.input",
    "mlp_act": "mlp.c_proj.input",
}
_OPT = _BLOCK | {
    "attn_z": "self_attn.out_proj.input",
    "resid_mid": "final_layer_norm.input",
    "mlp_in": "fc1.input",
    "mlp_act": "fc2.input",
    "mlp_out": "fc2.output",
    "mlp_out_post": "fc2.output",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of pre-norm decoders.

    block : site -> `<module>.input` or `<module>.output`, from one layer; the layer itself has no name.
    layers, norm, embed : paths of the blocks, the last norm and the token embedding, from the causal-LM module.
    positions : path of learned position embeddings, which are added to the token's.
    normalizer : path of the buffer by which vLLM multiplies the token's embedding.
    pairs : whether a layer in vLLM takes and returns (hidden, residual), whose sum is the stream.
    vllm : what differs from `block` there.
    d_ff : the config's name for the width of `mlp_act`.
    attention : Hugging Face's implementation that computes what the model means, where its default does not.
    required : config value -> what it must be, or the name of the config value that it must equal.
    adapted : whether LoRA adapters and quantised weights were tested.
    """

    name: str
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    layers: str = "model.layers"
    norm: str = "model.norm"
    embed: str = "model.embed_tokens"
    positions: str | None = None
    normalizer: str | None = None
    pairs: bool = True
    vllm: Mapping[str, str] = field(default_factory=dict)
    d_ff: str = "intermediate_size"
    attention: str | None = None
    required: Mapping[str, Any] = field(default_factory=dict)
    adapted: bool = True

    @property
    def sites(self) -> tuple[str, ...]:
        return ("embed", *self.block, "final_norm")

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Paths of the embeddings and of the head."""
        return tuple(path for path in (self.embed, self.positions, "lm_head") if path)

    @property
    def norms_outputs(self) -> bool:
        """Whether a norm stands between a module's output and the stream, so that `_out` and `_out_post` differ."""
        return self.block["mlp_out"] != self.block["mlp_out_post"]

    def locate(self, site: str, layer: int, vllm: bool) -> tuple[str, str]:
        """(path of a module from the causal-LM module, `input` or `output`) of a site. layer : its index."""
        if site == "final_norm":
            return self.norm, "output"
        if site == "embed":
            site, layer = "resid_pre", 0
        module, _, end = ((vllm and self.vllm.get(site)) or self.block[site]).rpartition(".")
        return f"{self.layers}.{layer}.{module}".rstrip("."), end

    def site_at(self, path: str) -> str | None:
        """The site at what follows a layer in Hugging Face's module path; an output where it does not end in `.input`."""
        at = path if path in (".input", ".output") else path.removeprefix(".")
        if not at.endswith((".input", ".output")):
            at += ".output"
        return next((site for site, place in self.block.items() if place == at), None)

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raise UnknownNameError for a site that the family does not have."""
        if missing := [site for site in sites if site not in self.sites]:
            why = ": its MLP is a set of experts, each with its own" if missing == ["mlp_act"] else ""
            raise UnknownNameError(
                f"the family {self.name} has no {', '.join(missing)}{why}; it has {', '.join(self.sites)}"
            )

    def check_config(self, config: Any) -> None:
        """Raise UnknownNameError for a variant whose sites lie elsewhere. config : as transformers reads it."""
        expected = {
            name: getattr(config, value) if isinstance(value, str) else value for name, value in self.required.items()
        }
        if found := {name: getattr(config, name) for name, value in expected.items() if getattr(config, name) != value}:
            raise UnknownNameError(
                f"this variant of the family {self.name} is not supported: its config has {_listed(found)}, expected "
                f"{_listed({name: expected[name] for name in found})}"
            )

    def widths(self, config: Any) -> dict[str, int]:
        """Kind of width -> elements; no `d_mlp` where the family has none. config : as transformers reads it."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        widths = {"hidden": hidden, "d_attn": heads * (getattr(config, "head_dim", None) or hidden // heads)}
        if "mlp_act" in self.block:
            widths["d_mlp"] = getattr(config, self.d_ff) or 4 * hidden  # GPT-2's n_inner may be None
        return widths


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Phi3ForCausalLM": Family("phi3"),
    # scaled_dot_product_attention, the default, leaves out the capping of the attention's logits
    "Gemma2ForCausalLM": Family("gemma2", _GEMMA, normalizer="model.normalizer", attention="eager"),
    "Gemma3ForCausalLM": Family("gemma3", _GEMMA, normalizer="model.normalizer"),
    "GPT2LMHeadModel": Family(
        "gpt2",
        _GPT2,
        layers="transformer.h",
        norm="transformer.ln_f",
        embed="transformer.wte",
        positions="transformer.wpe",
        pairs=False,
        d_ff="n_inner",
        required={"add_cross_attention": False},
        adapted=False,
    ),
    "OPTForCausalLM": Family(
        "opt",
        _OPT,
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        pairs=False,
        d_ff="ffn_dim",
        # a matrix product between embedding and block 0 is rounded differently in each batch: no row could be checked
        required={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": "hidden_size",
        },
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        _EXPERTS,
        vllm={site: at.replace("mlp", "block_sparse_moe") for site, at in _EXPERTS.items()},
        adapted=False,
    ),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", _EXPERTS, adapted=False),
    "OlmoeForCausalLM": Family("olmoe", _EXPERTS, adapted=False),
}


def family_of(architectures: Sequence[str] | None) -> Family:
    """The family of a model's `architectures` (config.json). Raises UnknownNameError for one that is not in the table."""
    for architecture in architectures or ():
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise UnknownNameError(
        f"model architecture {', '.join(architectures or ['(none)'])} is not supported: "
        f"expected one of {', '.join(FAMILIES)}"
    )
