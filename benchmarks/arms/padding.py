"""Left-padded batches of prompts, and the lengths of the answers behind them."""

from dataclasses import dataclass

import torch


@dataclass
class Padded:
    """ids, mask : (prompt, token) int64; the mask is 0 on padding."""

    ids: torch.Tensor
    mask: torch.Tensor

    def extended(self, out: torch.Tensor) -> torch.Tensor:
        """The mask over prompts and answers; `out` : (prompt, token)."""
        return torch.cat([self.mask, self.mask.new_ones(len(out), out.shape[1] - self.ids.shape[1])], 1)


def pad_left(prompts: list[list[int]], pad: int) -> Padded:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Padded(ids, mask)


def answer_lengths(out: torch.Tensor, prompts: Padded, end_ids: list[int]) -> list[int]:
    """Tokens of each answer, the one that ends it included."""
    answers = out[:, prompts.ids.shape[1] :]
    ends = torch.isin(answers, torch.tensor(end_ids))
    return [int(row.int().argmax()) + 1 if row.any() else len(row) for row in ends]
