"""The row that every arm must have captured: Hugging Face, float32, one prompt at a time."""

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


class Reference:
    """Rows of one layer at the last token of a prompt."""

    def __init__(self, model: str | Path, layer: int) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._rows: dict[str, np.ndarray] = {}
        block = self._model.model.layers[layer]
        for site, module in (("attn_out", block.self_attn), ("mlp_out", block.mlp), ("resid_post", block)):
            module.register_forward_hook(self._keep(site))
        block.mlp.register_forward_pre_hook(lambda module, args: self._put("mlp_in", args[0]))

    def _keep(self, site: str):
        return lambda module, args, output: self._put(site, output[0] if isinstance(output, tuple) else output)

    def _put(self, site: str, values: torch.Tensor) -> None:
        self._rows[site] = values[0, -1].float().numpy()

    def what_is_wrong(self, ids: Sequence[int], others: Sequence[int], rows: dict[str, Sequence[float]]) -> str | None:
        """Why these cannot be the rows of the prompt's last token, or None.

        ids, others : this prompt and another one.  rows : {site: (hidden,)}.
        """
        own, other = self._last_rows(ids), self._last_rows(others)
        for site, row in rows.items():
            error, to_other = (_error(np.asarray(row), expected[site]) for expected in (own, other))
            if not error <= _TOLERANCE:
                return f"captured a row of {site} that differs from Hugging Face's by {error:.3f} (relative L2)"
            if not error < to_other:
                return f"captured a row of {site} that is another prompt's rather than its own"
        return None

    @torch.inference_mode()
    def _last_rows(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        self._model.model(torch.tensor([list(ids)]))
        return dict(self._rows)


def _error(row: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(row - expected) / np.linalg.norm(expected))
