"""Model families: where the sites lie in each architecture. What is not in the table is refused by name."""

from dataclasses import dataclass

from hiddenlake.cache.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of a pre-norm decoder, the same in Hugging Face's and vLLM's implementation.

    layers, embed, norm : paths from the causal-LM module.
    attn, mlp : paths from one layer.

    In vLLM every family here returns (hidden, residual) from a layer, whose sum is the stream.
    """

    name: str
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    attn: str = "self_attn"
    mlp: str = "mlp"


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
}


def family_of(architectures: list[str] | None) -> Family:
    """The family of a model's `architectures` (config.json). Raises UnknownNameError for one that is not in the table."""
    for architecture in architectures or ():
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise UnknownNameError(
        f"model architecture {', '.join(architectures or ['(none)'])} is not supported: "
        f"expected one of {', '.join(FAMILIES)}"
    )
