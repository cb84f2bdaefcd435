"""A vLLM worker that tells what its scheduler does to requests. Named to vLLM by `worker_cls`, so the engine's process
imports it; everything else of that process is as shipped."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class WatchingWorker(CPUWorker):
    """Two verbs more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preemptions = 0
        self._out: set[str] = set()

    def compile_or_warm_up_model(self) -> Any:
        """oneDNN keeps what it compiles for each size of a batch: hundreds of megabytes, which are to be there from the
        start, and not to hide what else grows."""
        times = super().compile_or_warm_up_model()
        runner = self.model_runner
        for tokens in range(1, runner.max_num_tokens + 1):
            hidden, _ = runner._dummy_run(tokens)
            runner.get_model().compute_logits(hidden)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        thrown_out = scheduler_output.preempted_req_ids or set()
        self._preemptions += len(thrown_out)
        self._out |= thrown_out
        self._out -= scheduler_output.num_scheduled_tokens.keys() | scheduler_output.finished_req_ids
        return super().execute_model(scheduler_output)

    def soak_preemptions(self) -> int:
        """How often a request was thrown out of the batch."""
        return self._preemptions

    def soak_moments(self, keys: list[str]) -> dict[str, str]:
        """What is being done for each key's request: `waiting`, `prefilling`, `preempted` or `decoding`."""
        # vLLM appends eight hex digits to the id that it was given; one that is asked for again is the last
        states = {name[:-9]: state for name, state in self.model_runner.requests.items()}
        return {key: self._moment(states.get(key)) for key in keys}

    def _moment(self, state: Any) -> str:
        if state is None:
            return "waiting"
        if state.req_id in self._out:
            return "preempted"
        return "prefilling" if state.num_computed_tokens < state.num_prompt_tokens else "decoding"
