"""Hooks: where vLLM's modules show each site, and what must enter block 0."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.families import Family

Write = Callable[[torch.Tensor, torch.Tensor | None], None]

# The stream itself: where layers pass pairs, the sum of two tensors.
_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")

# Token ids that are looked up at once when vocabulary shards are gathered: 16 MiB on the device at 8192 x bfloat16.
_GATHERED = 1024


def install_hook(model: torch.nn.Module, family: Family, site: str, layer: int, write: Write) -> None:
    """Call write(hidden, residual or None) with one site's tensors, (token, width) each, in every forward pass.

    layer : block index, of the whole model; of no meaning where the site has none.
    write : copies the sum at once, since the next fused norm overwrites both in place. It is traced by torch.compile
        together with the model.

    Raises CaptureError in the forward pass where a quantised kernel leaves no plain tensor at the site.
    """
    path, end = family.locate(site, layer, vllm=True)
    # a layer that takes pairs is called with (positions, hidden, residual); a norm with (hidden, residual)
    first = int(family.pairs and site in ("embed", "resid_pre"))
    pair = family.pairs and site in _STREAM

    def read(values: tuple) -> None:
        hidden = values[first]
        if not isinstance(hidden, torch.Tensor):
            raise CaptureError(
                f"{site} cannot be captured from this model: vLLM fuses the quantisation of {path}'s {end} into the "
                f"kernel before it; leave the site out, or use the unquantised checkpoint"
            )
        write(hidden, values[first + 1] if pair else None)

    # a hook that returned something would replace the value

    def before(module: Any, args: tuple) -> None:
        read(args)

    def after(module: Any, args: tuple, output: Any) -> None:
        read(output if isinstance(output, tuple) else (output,))

    module = model.get_submodule(path)
    if end == "input":
        module.register_forward_pre_hook(before)
    else:
        module.register_forward_hook(after)


class Embedding:
    """What enters block 0: bit for bit what the model computes for a token at a position.

    Must be made by all ranks of a tensor-parallel group at once, after the model is loaded: each has a part of the
    vocabulary, and the first keeps the whole in host memory, vocabulary x hidden in the model's dtype. So it does on
    a GPU, where a lookup would wait behind the step that the model is in. Else nothing is copied.

    rank : in that group.
    """

    def __init__(self, model: torch.nn.Module, family: Family, rank: int) -> None:
        tokens = model.get_submodule(family.embed)
        # a LoRA wrapper adds what the adapter of the batch that runs has for the token: nothing but 0.0
        self._wrapped = hasattr(tokens, "base_layer")
        tokens = getattr(tokens, "base_layer", tokens)
        self._device = next(tokens.parameters()).device
        self._tokens = tokens
        if tokens.tp_size > 1 or self._device.type != "cpu":
            whole = _gather(tokens, self._device, keep=rank == 0)
            self._device = torch.device("cpu")
            self._tokens = whole.__getitem__
        self._scale = model.get_buffer(family.normalizer).to(self._device) if family.normalizer else None
        self._positions = None
        if family.positions:
            positions = model.get_submodule(family.positions)
            self._positions = positions.weight[getattr(positions, "offset", 0) :].to(self._device)

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """(n, hidden) in the model's dtype. positions : token indices in their sequences. Not for other ranks than the first."""
        embed = self._tokens(torch.tensor(token_ids, device=self._device))
        if self._wrapped:
            embed = embed + 0.0  # which makes 0.0 of -0.0
        if self._scale is not None:
            embed = embed * self._scale
        if self._positions is not None:
            embed = embed + self._positions[torch.tensor(positions, device=self._device)]
        return embed


@torch.inference_mode()
def _gather(tokens: torch.nn.Module, device: torch.device, keep: bool) -> torch.Tensor:
    """(vocabulary, hidden) on the host where asked to keep it, by the lookup that every rank takes part in."""
    whole = torch.empty(tokens.org_vocab_size if keep else 0, tokens.embedding_dim, dtype=tokens.params_dtype)
    for ids in torch.arange(tokens.org_vocab_size, device=device).split(_GATHERED):
        part = tokens(ids)
        if keep:
            whole[int(ids[0]) : int(ids[-1]) + 1] = part
    return whole
