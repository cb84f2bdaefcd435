"""Small models of every family with random weights, and what Hugging Face computes in them: hooks of the tests' own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

N_LAYERS = 3

# Projections are wider than the stream where the family allows it, so that no width can be mistaken for another.
_SHAPE = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WIDE = _SHAPE | {"head_dim": 64}
_GEMMA = _WIDE | {
    "query_pre_attn_scalar": 64, "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2}

# family -> (config class, model class, settings)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _WIDE),
    "mistral": ("MistralConfig", "MistralForCausalLM", _WIDE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SHAPE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _WIDE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SHAPE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 49152, "n_embd": 128, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", _SHAPE | {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _WIDE | _EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _WIDE | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 96}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", _SHAPE | _EXPERTS | {"num_experts": 4}),
}  # fmt: skip


# Linear layers of the blocks, by how their names end.
LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj", "out_proj", "fc1", "fc2",
)  # fmt: skip


def make_model(family: str, folder: Path, tokenizer: Path) -> None:
    """Save a model whose norms and biases are random too, with a tokenizer."""
    config_class, model_class, settings = MODELS[family]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**settings, dtype="float32")
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.08)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


class Reference:
    """Hugging Face, one sequence at a time, in float32."""

    def __init__(self, family: str, folder: Path) -> None:
        # eager: the only implementation that caps Gemma 2's attention logits on a CPU
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._model.eval()
        self._kept: dict[str, list[torch.Tensor]] = {}
        m = self._model
        if family == "gpt2":
            blocks, last = m.transformer.h, m.transformer.ln_f
        elif family == "opt":
            blocks, last = m.model.decoder.layers, m.model.decoder.final_layer_norm
        else:
            blocks, last = m.model.layers, m.model.norm
        for block in blocks:
            self._watch(block, "resid_pre", "resid_post")
            if family == "gpt2":
                self._watch(block.attn.c_proj, "attn_z", None)
                self._watch(block.attn, None, "attn_out")
                self._watch(block.ln_2, "resid_mid", None)
                self._watch(block.mlp, "mlp_in", "mlp_out")
                self._watch(block.mlp.c_proj, "mlp_act", None)
                continue
            self._watch(block.self_attn, None, "attn_out")
            if family == "opt":
                self._watch(block.self_attn.out_proj, "attn_z", None)
                self._watch(block.final_layer_norm, "resid_mid", None)
                self._watch(block.fc1, "mlp_in", None)
                self._watch(block.fc2, "mlp_act", "mlp_out")
                continue
            self._watch(block.self_attn.o_proj, "attn_z", None)
            self._watch(block.mlp, "mlp_in", "mlp_out")
            if hasattr(block.mlp, "down_proj"):
                self._watch(block.mlp.down_proj, "mlp_act", None)
            if family.startswith("gemma"):
                self._watch(block.post_attention_layernorm, None, "attn_out_post")
                self._watch(block.pre_feedforward_layernorm, "resid_mid", None)
                self._watch(block.post_feedforward_layernorm, None, "mlp_out_post")
            else:
                self._watch(block.post_attention_layernorm, "resid_mid", None)
        self._watch(last, None, "final_norm")

    def _watch(self, module: torch.nn.Module, before: str | None, after: str | None) -> None:
        def hook(module, args, kwargs, output):
            for name, value in ((before, args[0] if args else kwargs["hidden_states"]), (after, output)):
                if name:
                    value = value[0] if isinstance(value, tuple) else value
                    self._kept.setdefault(name, []).append(value.reshape(-1, value.shape[-1]).clone())

        module.register_forward_hook(hook, with_kwargs=True)

    def replace(self, weights: dict[str, torch.Tensor]) -> None:
        """Give weights other values, by name."""
        with torch.no_grad():
            for name, values in weights.items():
                self._model.get_parameter(name).copy_(values)

    def round_inputs(self, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Have the linear layers of the blocks compute with other inputs than those that are watched."""
        for name, module in self._model.named_modules():
            if name.endswith(LINEAR):
                module.forward = lambda x, forward=module.forward: forward(rounded(x))

    def __call__(self, token_ids: list[int]) -> dict[str, np.ndarray]:
        """{site: (layer, token, width)}, float32, without layer for `embed` and `final_norm`."""
        self._kept.clear()
        with torch.inference_mode():
            states = self._model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        rows = {site: torch.stack(values).numpy() for site, values in self._kept.items()}
        rows["final_norm"] = rows["final_norm"][0]
        rows["embed"] = states[0][0].numpy()
        # what the hooks saw is what the model itself calls the stream after k blocks; its last entry is normed
        for k in range(1, N_LAYERS):
            assert np.array_equal(rows["resid_post"][k - 1], states[k][0].numpy())
        assert np.array_equal(rows["final_norm"], states[-1][0].numpy())
        for site in ("attn_out", "mlp_out"):
            rows.setdefault(f"{site}_post", rows[site])
        return rows
