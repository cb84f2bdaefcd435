"""The rows that must have been captured: Hugging Face, float32, one sequence at a time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

# Relative L2 error of a bfloat16 row. Measured over ten prompts at layer 15: 0.03 at most, another token's row 0.98 at
# least. Another prompt's last token is the template's too, and lies only 0.02 to 0.06 away at the nearest: so a row
# must also be nearer to its own prompt's than to another's.
_TOLERANCE = 0.1


class Rows:
    """Every row of a Llama, by hooks of its own."""

    def __init__(self, model: str | Path) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._kept: dict[str, list[torch.Tensor]] = {}
        inner = self.model.model
        for block in inner.layers:
            self._watch(block, "resid_pre", "resid_post")
            self._watch(block.self_attn, None, "attn_out")
            self._watch(block.self_attn.o_proj, "attn_z", None)
            self._watch(block.post_attention_layernorm, "resid_mid", None)
            self._watch(block.mlp, "mlp_in", "mlp_out")
            self._watch(block.mlp.down_proj, "mlp_act", None)
        self._watch(inner.layers[0], "embed", None)
        self._watch(inner.norm, None, "final_norm")

    def _watch(self, module: torch.nn.Module, before: str | None, after: str | None) -> None:
        def hook(module, args, kwargs, output):
            for site, value in ((before, args[0] if args else kwargs.get("hidden_states")), (after, output)):
                if site:
                    value = value[0] if isinstance(value, tuple) else value
                    self._kept.setdefault(site, []).append(value[0].float().clone())

        module.register_forward_hook(hook, with_kwargs=True)

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """{site: (layer, token, width) float32}, without layer for `embed` and `final_norm`; and `logits`."""
        self._kept = {}
        logits = self.model(torch.tensor([list(ids)])).logits[0]
        rows = {site: torch.stack(values).numpy() for site, values in self._kept.items()}
        return rows | {site: rows[site][0] for site in ("embed", "final_norm")} | {"logits": logits.float().numpy()}


class Reference:
    """Rows of one layer at the last token of a prompt."""

    def __init__(self, model: str | Path, layer: int) -> None:
        self.rows, self._layer = Rows(model), layer

    def what_is_wrong(self, ids: Sequence[int], others: Sequence[int], rows: dict[str, Sequence[float]]) -> str | None:
        """Why these cannot be the rows of the prompt's last token, or None.

        ids, others : this prompt and another one.  rows : {site: (hidden,)}.
        """
        own, other = self.rows(ids), self.rows(others)
        for site, row in rows.items():
            error, to_other = (
                float(relative_error(np.asarray(row), expected[site][self._layer, -1])) for expected in (own, other)
            )
            if not error <= _TOLERANCE:
                return f"captured a row of {site} that differs from Hugging Face's by {error:.3f} (relative L2)"
            if not error < to_other:
                return f"captured a row of {site} that is another prompt's rather than its own"
        return None


def relative_error(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """L2 norm of the difference over that of the expected, along the last axis."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
