"""Plain vLLM: as it is shipped, without taps. What capture is compared with."""

from collections.abc import Sequence

from hiddenlake.cache.engines import vllm_setup as setup
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.samples import Prompt


class PlainVllm:
    """vLLM with the same model, settings and decoding, prefix cache on."""

    def __init__(self, request: Request) -> None:
        setup.import_vllm()
        setup.choose_environment()
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        options = dict(request.options)
        if current_platform.is_cpu():
            options = setup.CPU_OPTIONS | options
        self._llm = LLM(
            model=request.model.path,
            dtype=request.model.dtype,
            max_model_len=request.max_length,
            **options,
        )
        decoding = request.decoding
        self._sampling = SamplingParams(
            temperature=decoding.sampling.temperature,
            top_p=decoding.sampling.top_p,
            top_k=decoding.sampling.top_k,
            stop=list(decoding.sampling.stop),
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(request.model.end_ids),
        )

    def generate(self, prompts: Sequence[Prompt]) -> int:
        """Generate an answer to each prompt. Returns the number of tokens generated."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(p.token_ids)} for p in prompts], self._sampling, use_tqdm=False
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
