"""A scheduler that feeds a request's last token, so that it has an activation too.

vLLM never feeds the last sampled token back. For requests that ask for it, the stop is held back for one
step: the token is fed, what that step samples is dropped, and the client sees the same tokens, text,
finish reason and log-probabilities as without, one step later.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from hiddenlake.cache.worker.orphan import exit_with_parent
from hiddenlake.cache.worker.plan import LAST_TOKEN_ARG


class _LastTokenMixin:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._runner_output = model_runner_output
        self._held_logprobs: dict[str, Any] = {}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._held_logprobs:
            for group in outputs.values():
                for output in group.outputs:
                    if output.request_id in self._held_logprobs:
                        output.new_logprobs = self._held_logprobs[output.request_id]
        self._runner_output = None
        return outputs

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], **stale: bool
    ) -> tuple[list[int], bool]:
        # since vLLM 0.32 `is_stale` marks what a preempted request had under way; 0.25 counts what is to be discarded
        held = getattr(request, "hiddenlake_held", None)
        if held is not None and not getattr(request, "async_tokens_to_discard", 0):
            # the extra step has run: report what was held back
            request.hiddenlake_held = None
            request.status, request.stop_reason, tokens, logprobs = held
            if logprobs is not None:
                self._held_logprobs[request.request_id] = logprobs
            # asynchronous scheduling counts ahead
            if not stale.get("is_stale") and request.num_output_placeholders > 0:
                request.num_output_placeholders -= len(new_token_ids)
            return tokens, True

        status = request.status
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, **stale)
        if stopped and self._wants_last_token(request):
            request.hiddenlake_held = (
                request.status,
                request.stop_reason,
                list(tokens),
                self._logprobs(request, tokens),
            )
            request.status, request.stop_reason = status, None
            return [], False
        return tokens, stopped

    def _wants_last_token(self, request: Any) -> bool:
        params = request.sampling_params
        return (
            params is not None
            and bool((params.extra_args or {}).get(LAST_TOKEN_ARG))
            and request.num_tokens < self.max_model_len  # no position is left for it otherwise
            # an accepted draft may already have been fed
            and request.num_computed_tokens - request.num_output_placeholders < request.num_tokens
        )

    def _logprobs(self, request: Any, tokens: list[int]) -> Any:
        """The held token's log-probabilities: they belong to the step that sampled it."""
        output = self._runner_output
        if request.sampling_params.num_logprobs is None or not output.logprobs:
            return None
        return output.logprobs.slice_request(output.req_id_to_index[request.request_id], len(tokens))


class LastTokenScheduler(_LastTokenMixin, Scheduler):
    """For synchronous scheduling."""


class LastTokenAsyncScheduler(_LastTokenMixin, AsyncScheduler):
    """For asynchronous scheduling."""


def last_token_scheduler(*, vllm_config: Any, **settings: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: the one that fits its configuration."""
    chosen = LastTokenAsyncScheduler if vllm_config.scheduler_config.async_scheduling else LastTokenScheduler
    return chosen(vllm_config=vllm_config, **settings)
