"""Models made on the spot, for machines without a network and runs that must be quick, and prompts for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Of a Llama; heads of 128."""

    name: str
    layers: int
    hidden: int
    d_ff: int
    heads: int
    kv_heads: int
    vocabulary: int


LLAMA_8B = Shape("Llama-3.1-8B's shape", 32, 4096, 14336, 32, 8, 128256)
SMALL = Shape("8 layers x 1024", 8, 1024, 3584, 8, 2, 32768)

# The stream starts this much stronger than in real models, whose layers add more than the embedding was. Then a token
# decides the next one by far, and rounding never changes an answer.
_EMBEDDING = 1.0
_LOGITS = 0.01


def make_model(folder: Path, shape: Shape, weights: bool, ends: Sequence[int] = ()) -> Path:
    """A Hugging Face folder: config and tokenizer, and random weights in bfloat16 or, for load_format="dummy", none.

    ends : tokens that end an answer, beside the last of the vocabulary.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    end = shape.vocabulary - 1
    LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=shape.vocabulary, hidden_size=shape.hidden,
        intermediate_size=shape.d_ff, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=end,
    ).save_pretrained(folder)  # fmt: skip
    GenerationConfig(eos_token_id=[end, *ends]).save_pretrained(folder)
    words = {**{f"w{i}": i for i in range(end - 1)}, "<unk>": end - 1, "</s>": end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    if not weights:
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # what a model's identity is made from
        return folder
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    embedding = _EMBEDDING * torch.randn(shape.vocabulary, shape.hidden)
    head = torch.empty_like(embedding)
    head[torch.randperm(shape.vocabulary)] = _LOGITS * embedding
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": torch.ones(shape.hidden),
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            heads = shape.heads if name == "q_proj" else shape.kv_heads
            tensors[f"{layer}.self_attn.{name}.weight"] = matrix(heads * 128, shape.hidden)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(shape.hidden, shape.heads * 128)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(shape.d_ff, shape.hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(shape.d_ff, shape.hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(shape.hidden, shape.d_ff)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(shape.hidden)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts(shape: Shape, seed: int, count: int, tokens: int) -> list[str]:
    """Prompts that no other seed has: words that are a token each."""
    chance = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in row) for row in chance.integers(0, shape.vocabulary - 2, (count, tokens))]
