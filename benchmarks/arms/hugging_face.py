"""Hugging Face: generate, then a second forward pass over prompt and answer with hooks, all rows kept in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from padding import Padded, answer_lengths, pad_left
from serve import expect, serve
from transformers import AutoModelForCausalLM


class HuggingFace:
    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.end_ids = spec["end_ids"]
        self.model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16).eval()

    def prepare(self, round: dict[str, Any]) -> list[tuple[Padded, int]]:
        batch = round["batch"]
        ids = round["ids"]
        return [
            (pad_left(ids[at : at + batch], self.end_ids[0]), round["max_new_tokens"])
            for at in range(0, len(ids), batch)
        ]

    @torch.inference_mode()
    def run(self, work: list[tuple[Padded, int]]) -> list[tuple[Padded, torch.Tensor, list[torch.Tensor]]]:
        done = []
        for prompts, max_new_tokens in work:
            out = self.model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.end_ids,
                pad_token_id=self.end_ids[0],
            )
            mask = prompts.extended(out)
            with self._hooks() as rows:
                # without the head: the activations need no logits
                self.model.model(out, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            done.append((prompts, out, rows))
        return done

    @contextmanager
    def _hooks(self) -> Iterator[list[torch.Tensor]]:
        rows: list[torch.Tensor] = []
        handles = [
            layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output))
            for layer in self.model.model.layers
        ]
        yield rows
        for handle in handles:
            handle.remove()

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        tokens = nbytes = 0
        config = self.model.config
        for prompts, out, rows in result:
            shape = (*out.shape, config.hidden_size)
            expect("rows", [tuple(row.shape) for row in rows], [shape] * config.num_hidden_layers)
            lengths = answer_lengths(out, prompts, self.end_ids)
            tokens += sum(lengths)
            real = int(prompts.mask.sum()) + sum(lengths)
            nbytes += real * len(rows) * config.hidden_size * 2
        prompts, _, rows = result[0]
        row = rows[round["layer"]][0, prompts.ids.shape[1] - 1]
        return {"tokens": tokens, "bytes": nbytes, "rows": {"mlp_out": row.float().tolist()}}


if __name__ == "__main__":
    serve(HuggingFace)
