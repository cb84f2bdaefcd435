"""vllm-lens: its plugin, loaded by vLLM itself, returns the residual stream of all layers with each answer."""

from typing import Any

from serve import expect, serve
from vllm_alone import VllmAlone


class VllmLens(VllmAlone):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.shape = spec["layers"], spec["hidden"]
        self.extra = {"output_residual_stream": list(range(spec["layers"]))}

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        layers, hidden = self.shape
        answers = super().report(round, result)
        for ids, output in zip(round["ids"], result, strict=True):
            # the last token is never fed, so it has no row here
            n = len(ids) + len(output.outputs[0].token_ids) - 1
            stream = output.activations["residual_stream"]
            expect("residual stream", tuple(stream.shape), (layers, n, hidden))
            answers["bytes"] += stream.nbytes
        first = result[0].activations["residual_stream"]
        row = first[round["layer"], len(round["ids"][0]) - 1]
        return {**answers, "rows": {"resid_post": row.float().tolist()}}


if __name__ == "__main__":
    serve(VllmLens)
