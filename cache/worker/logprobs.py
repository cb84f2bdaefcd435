"""Log-probabilities of the tokens themselves, on a CPU: a row at a time, since a row fits into the core's cache."""

from typing import Any

import torch


def install_logprobs(sampler: Any) -> None:
    """Make vLLM's V1 sampler cheaper where only the token's own log-probability is asked for.

    vLLM writes the log-softmax of the whole vocabulary for every token and ranks the token in it, which took 7 % of a
    small model's time; ranks are 0 here. For an engine whose requests are all ours. More than the token's own is
    computed as before.
    """
    whole, several = sampler.compute_logprobs, sampler.gather_logprobs

    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        # the sampler goes on in float32, in place; what it is given here must stay as it is until it is gathered
        return logits.clone() if logits.dtype is torch.float32 else logits

    def gather_logprobs(logits: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        if num_logprobs:
            return several(whole(logits), num_logprobs, token_ids)
        from vllm.v1.outputs import LogprobsTensors

        ids = token_ids.unsqueeze(-1)
        ranks = torch.zeros(len(ids), dtype=torch.int32)
        return LogprobsTensors(ids.to(torch.int32), token_logprobs(logits, token_ids)[:, None], ranks)

    sampler.compute_logprobs, sampler.gather_logprobs = compute_logprobs, gather_logprobs


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """(row,) float32: log-softmax of logits (row, vocabulary) at one token a row."""
    own = logits.gather(-1, token_ids.unsqueeze(-1)).float()[:, 0]
    total = torch.empty(len(logits))
    row = torch.empty(logits.shape[-1])
    for i in range(len(logits)):
        # the copy converts; subtracting something at once would take three times as long
        torch.sum(row.copy_(logits[i]).exp_(), 0, out=total[i])
    logprobs = own - total.log()
    # logits so far from zero that float32 has no exponential of them, or one of few digits
    if (far := (total < 1e-30) | ~total.isfinite()).any():
        logprobs[far] = own[far] - logits[far].float().logsumexp(-1)
    return logprobs
