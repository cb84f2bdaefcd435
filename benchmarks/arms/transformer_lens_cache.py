"""TransformerLens: `generate(return_cache=True)` a prompt at a time; or, since that takes one prompt only, a batch
generated and then run with a cache, as its documentation advises."""

from typing import Any

import torch
from padding import Padded, answer_lengths, pad_left
from serve import expect, serve
from transformer_lens.model_bridge import TransformerBridge


class TransformerLens:
    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.end_ids = spec["end_ids"]
        self.shape = spec["layers"], spec["hidden"]
        self.model = TransformerBridge.boot_transformers(spec["model"], dtype=torch.bfloat16, device="cpu")

    def prepare(self, round: dict[str, Any]) -> Any:
        batch, ids = round["batch"], round["ids"]
        batches = [pad_left(ids[at : at + batch], self.end_ids[0]) for at in range(0, len(ids), batch)]
        return batches, round["max_new_tokens"]

    @torch.inference_mode()
    def run(self, work: Any) -> list[tuple[Padded, torch.Tensor, dict[str, torch.Tensor]]]:
        batches, max_new_tokens = work
        done = []
        for prompts in batches:
            options = {
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "eos_token_id": self.end_ids[0],
                "verbose": False,
            }
            if len(prompts.ids) == 1:
                out, cache = self.model.generate(prompts.ids, return_cache=True, names_filter=_is_wanted, **options)
            else:
                out = self.model.generate(prompts.ids, attention_mask=prompts.mask, **options)
                _, cache = self.model.run_with_cache(out, names_filter=_is_wanted, attention_mask=prompts.extended(out))
            done.append((prompts, out, dict(cache.items())))
        return done

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        layers, hidden = self.shape
        tokens = nbytes = 0
        for prompts, out, cache in result:
            found = {name: tuple(rows.shape) for name, rows in cache.items()}
            expect("cache", found, {_name(layer): (*out.shape, hidden) for layer in range(layers)})
            lengths = answer_lengths(out, prompts, self.end_ids)
            tokens += sum(lengths)
            nbytes += (int(prompts.mask.sum()) + sum(lengths)) * layers * hidden * 2
        prompts, _, cache = result[0]
        row = cache[_name(round["layer"])][0, prompts.ids.shape[1] - 1]
        return {"tokens": tokens, "bytes": nbytes, "rows": {"mlp_out": row.float().tolist()}}


def _name(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_out"


def _is_wanted(name: str) -> bool:
    return name.endswith(".mlp.hook_out")


if __name__ == "__main__":
    serve(TransformerLens)
