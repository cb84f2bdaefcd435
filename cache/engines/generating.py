"""Generating: answers by Hugging Face's generate, a batch at a time."""

from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.model import Model


def generate(
    network: Any,
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None = None,
) -> list[list[int]]:
    """Answers, end-of-sequence token included, to prompts of token ids. No sequence is longer than the context.

    network : the loaded model.  seed : of one prompt's answer, where it is drawn.
    """
    import torch
    from transformers import GenerationConfig

    sampled: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        [_] = prompts  # a batch has one generator
        torch.manual_seed(seed)
        sampled = {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        }  # fmt: skip

    # any id pads: the mask hides it
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else model.end_ids[0]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with torch.inference_mode():
        # a config of our own: the checkpoint's may sample or penalise
        output = network.generate(
            input_ids=ids.to(network.device),
            attention_mask=mask.to(network.device),
            generation_config=GenerationConfig(
                max_new_tokens=min(max_new_tokens, model.context - min(map(len, prompts))),
                eos_token_id=list(model.end_ids),
                pad_token_id=pad,
                stop_strings=list(sampling.stop) or None,
                **sampled,
            ),
            **({"tokenizer": model.tokenizer} if sampling.stop else {}),
        )
    answers = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in model.end_ids), len(row))
        answers.append(_until_stop(row[: min(end, model.context - len(prompt))], model, sampling.stop))
    return answers


def _until_stop(answer: list[int], model: Model, stops: Sequence[str]) -> list[int]:
    """The answer up to the token that completes a stop string; a batch goes on until its last answer stops."""
    for n in range(1, len(answer) + 1) if stops else ():
        if any(stop in model.decode_answer(answer[:n]) for stop in stops):
            return answer[:n]
    return answer


def ending(answer: Sequence[int], model: Model, stops: Sequence[str]) -> tuple[str, str | None]:
    """(finish reason as vLLM's, `stop` or `length`; the text before a stop string, or None where there is none)."""
    shown = model.decode_answer(answer)
    if ends := [shown.index(stop) for stop in stops if stop in shown]:
        return "stop", shown[: min(ends)]
    return "stop" if answer[-1] in model.end_ids else "length", None
