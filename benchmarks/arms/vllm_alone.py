"""vLLM as it is shipped: LLM.generate, prefix cache on, no log-probabilities, no capture."""

from typing import Any

from serve import expect, serve
from vllm import LLM, SamplingParams


class VllmAlone:
    extra: dict[str, Any] | None = None  # of SamplingParams

    def __init__(self, spec: dict[str, Any]) -> None:
        self.end_ids = spec["end_ids"]
        self.llm = LLM(model=spec["model"], dtype="bfloat16", max_model_len=spec["max_length"], **spec["options"])

    def prepare(self, round: dict[str, Any]) -> Any:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=round["max_new_tokens"],
            stop_token_ids=self.end_ids,
            extra_args=self.extra,
        )
        return [{"prompt_token_ids": ids} for ids in round["ids"]], sampling

    def run(self, work: Any) -> Any:
        return self.llm.generate(*work, use_tqdm=False)

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        expect("answers", len(result), len(round["ids"]))
        return {"tokens": sum(len(output.outputs[0].token_ids) for output in result), "bytes": 0, "rows": {}}


if __name__ == "__main__":
    serve(VllmAlone)
