"""Answers: what vLLM reports of one request, piece by piece, put together into generations."""

from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.samples import Generation
from hiddenlake.cache.vllm_server.intake import Ticket
from hiddenlake.cache.worker.plan import KEY_ARG, TAIL_ARG

# Where a finished RequestOutput's kv_transfer_params name the samples.
ANSWER_KEY = "hiddenlake"

_UNFINISHED = ("abort", "error")


class Answers:
    """Of one request. Takes vLLM's RequestOutputs, whether they bring what is new or all there is.

    params : the SamplingParams that the caller gave.
    """

    def __init__(self, ticket: Ticket, params: Any) -> None:
        self.ticket = ticket
        self._delta = params.output_kind.name == "DELTA"
        self._has_text = params.detokenize
        self._wants_logprobs = params.logprobs is not None
        self._ids: list[list[int]] = [[] for _ in ticket.keys]
        self._steps: list[list[Any]] = [[] for _ in ticket.keys]
        self._texts = ["" for _ in ticket.keys]
        self._reasons: list[str] = ["abort" for _ in ticket.keys]
        self._stops: list[Any] = [None for _ in ticket.keys]

    def take(self, output: Any) -> None:
        """Take one output, and leave in it what the caller asked for."""
        for part in output.outputs:
            i, ids, steps = part.index, list(part.token_ids), list(part.logprobs or ())
            if self._delta:
                self._ids[i] += ids
                self._steps[i] += steps
                self._texts[i] += part.text
            else:
                self._ids[i], self._steps[i], self._texts[i] = ids, steps, part.text
            if part.finish_reason is not None:
                self._reasons[i], self._stops[i] = part.finish_reason, part.stop_reason
            if not self._wants_logprobs:
                part.logprobs = part.cumulative_logprob = None
        if output.finished:
            mine = {"capture": self.ticket.capture, "keys": list(self.ticket.keys)}
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), ANSWER_KEY: mine}

    def generation(self, i: int) -> Generation:
        """The i-th answer, under the ticket's i-th key. Raises CaptureError where it is none."""
        ids, reason = self._ids[i], self._reasons[i]
        if reason in _UNFINISHED:
            raise CaptureError(f"the answer was not finished: vLLM ended it with {reason!r}")
        logprobs = tuple(step[token].logprob for step, token in zip(self._steps[i], ids, strict=True))
        return Generation(self.ticket.keys[i], tuple(ids), logprobs, reason, self._texts[i] if self._has_text else None)

    def unfed(self, context: int, feeds_last: bool) -> list[tuple[str, Sequence[int]]]:
        """(key, the whole sequence) of each answer whose last token is wanted and was not fed.

        A stop string ends an answer outside the engine, which then never feeds the token that completed it.

        context : longest sequence.  feeds_last : whether the engine's scheduler feeds last tokens.
        """
        found = []
        for key, ids, reason, stop in zip(self.ticket.keys, self._ids, self._reasons, self._stops, strict=True):
            sequence = [*self.ticket.prompt_ids, *ids]
            wanted = self.ticket.last and reason not in _UNFINISHED and len(sequence) < context
            if wanted and (isinstance(stop, str) or not feeds_last):
                found.append((key, sequence))
        return found


def tail_params(key: str) -> Any:
    """vLLM's SamplingParams of a request that feeds a finished sample's last token, over what is cached of it."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=False,
        extra_args={KEY_ARG: key, TAIL_ARG: 1},
    )
