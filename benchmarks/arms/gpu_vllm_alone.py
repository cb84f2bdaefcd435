"""vLLM as it is shipped, on a GPU: with the model runner of its own choice, and CUDA graphs."""

from typing import Any

from gpu_facts import facts
from serve import serve
from vllm_alone import VllmAlone


class VllmAloneOnGpu(VllmAlone):
    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        return super().report(round, result) | facts(self.llm.llm_engine.vllm_config)


if __name__ == "__main__":
    serve(VllmAloneOnGpu)
