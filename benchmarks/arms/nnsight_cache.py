"""nnsight: one traced `generate` over the batch, the MLP outputs of every step kept by `tracer.cache`."""

from typing import Any

import torch
from nnsight import TransformersModel
from padding import Padded, answer_lengths, pad_left
from serve import expect, serve


class Nnsight:
    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.end_ids = spec["end_ids"]
        self.shape = spec["layers"], spec["hidden"]
        self.model = TransformersModel(spec["model"], task="text-generation", dtype=torch.bfloat16, dispatch=True)

    def prepare(self, round: dict[str, Any]) -> tuple[Padded, int]:
        return pad_left(round["ids"], self.end_ids[0]), round["max_new_tokens"]

    def run(self, work: tuple[Padded, int]) -> tuple[Padded, torch.Tensor, Any]:
        prompts, max_new_tokens = work
        model = self.model
        with model.generate(
            {"input_ids": prompts.ids, "attention_mask": prompts.mask},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
        ) as tracer:
            cache = tracer.cache(modules=[layer.mlp for layer in model.model.layers]).save()
            out = tracer.result.save()
        return prompts, out, cache

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        layers, hidden = self.shape
        prompts, out, cache = result
        n, q = prompts.ids.shape
        # a step a token, but for the last token, which is never fed
        steps = out.shape[1] - q
        shapes = [(n, q, hidden), *[(n, 1, hidden)] * (steps - 1)]
        for layer in range(layers):
            expect(f"layer {layer}", [tuple(step.shape) for step in cache[_path(layer)].output], shapes)
        lengths = answer_lengths(out, prompts, self.end_ids)
        row = cache[_path(round["layer"])].output[0][0, -1]
        nbytes = (int(prompts.mask.sum()) + sum(lengths) - n) * layers * hidden * 2
        return {"tokens": sum(lengths), "bytes": nbytes, "rows": {"mlp_out": row.float().tolist()}}


def _path(layer: int) -> str:
    return f"model.model.layers.{layer}.mlp"


if __name__ == "__main__":
    serve(Nnsight)
