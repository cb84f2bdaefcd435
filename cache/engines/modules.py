"""Modules: where Hugging Face's implementations show each site, what enters block 0, and what leaves the head."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hiddenlake.cache.families import Family

if TYPE_CHECKING:  # the driver's side imports without torch
    import torch


def hook(model: Any, family: Family, site: str, layer: int, keep: Callable[["torch.Tensor"], None]) -> Any:
    """Call keep(values) with one site's values, (batch x token, width), in every forward pass. Returns the handle."""
    path, end = family.locate(site, layer, vllm=False)
    module = model.get_submodule(path)

    def before(module: Any, args: tuple, kwargs: dict) -> None:
        keep((args[0] if args else kwargs["hidden_states"]).flatten(0, -2))

    def after(module: Any, args: tuple, output: Any) -> None:
        keep((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    if end == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def embed(model: Any, family: Family, token_ids: Sequence[int], positions: Sequence[int]) -> "torch.Tensor":
    """(n, hidden): what enters block 0, bit for bit. positions : token indices in their sequences."""
    import torch

    with torch.inference_mode():
        tokens = model.get_submodule(family.embed)
        values = tokens(torch.tensor(token_ids, device=tokens.weight.device))
        if family.positions:
            table = model.get_submodule(family.positions)
            at = torch.tensor(positions, device=tokens.weight.device) + getattr(table, "offset", 0)
            values = values + table.weight[at]
        return values


def logits(model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
    """(..., vocabulary) float32 of what the last norm returns, (..., hidden)."""
    values = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return values if cap is None else cap * (values / cap).tanh()
