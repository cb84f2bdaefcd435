"""Answers: what vLLM reports of one request, piece by piece, put together into generations."""

from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.samples import Generation
from hiddenlake.cache.server.intake import Ticket


class Answers:
    """Of one request. Takes vLLM's RequestOutputs, whether they bring what is new or all there is.

    params : the SamplingParams that the caller gave.
    """

    def __init__(self, ticket: Ticket, params: Any) -> None:
        self.ticket = ticket
        self._delta = params.output_kind.name == "DELTA"
        self._wants_logprobs = params.logprobs is not None
        self._ids: list[list[int]] = [[] for _ in ticket.keys]
        self._logprobs: list[list[float]] = [[] for _ in ticket.keys]
        self._texts = ["" for _ in ticket.keys]
        self._reasons: list[str] = ["abort" for _ in ticket.keys]
        self._stops: list[Any] = [None for _ in ticket.keys]

    def take(self, output: Any) -> None:
        """Take one output, and leave in it what the caller asked for."""
        for part in output.outputs:
            i, ids = part.index, list(part.token_ids)
            logprobs = [step[token].logprob for step, token in zip(part.logprobs or (), ids, strict=True)]
            if self._delta:
                self._ids[i] += ids
                self._logprobs[i] += logprobs
                self._texts[i] += part.text
            else:
                self._ids[i], self._logprobs[i], self._texts[i] = ids, logprobs, part.text
            if part.finish_reason is not None:
                self._reasons[i], self._stops[i] = part.finish_reason, part.stop_reason
            if not self._wants_logprobs:
                part.logprobs = part.cumulative_logprob = None
        if output.finished:
            mine = {"capture": self.ticket.capture, "keys": list(self.ticket.keys)}
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), "hiddenlake": mine}

    def generations(self) -> list[Generation]:
        """One an answer, in the order of the ticket's keys."""
        return [
            Generation(key, tuple(ids), tuple(logprobs), str(reason), text)
            for key, ids, logprobs, reason, text in zip(
                self.ticket.keys, self._ids, self._logprobs, self._reasons, self._texts, strict=True
            )
        ]

    def unfed(self, context: int, feeds_last: bool) -> list[tuple[str, Sequence[int]]]:
        """(key, the whole sequence) of each answer whose last token is wanted and was not fed.

        A stop string ends an answer outside the engine, which then never feeds the token that completed it.

        context : longest sequence.  feeds_last : whether the engine's scheduler feeds last tokens.
        """
        found = []
        for key, ids, reason, stop in zip(self.ticket.keys, self._ids, self._reasons, self._stops, strict=True):
            sequence = [*self.ticket.prompt_ids, *ids]
            ended = reason not in ("abort", "error")
            if self.ticket.last and ended and (isinstance(stop, str) or not feeds_last) and len(sequence) < context:
                found.append((key, sequence))
        return found


def tail_params(key: str) -> Any:
    """vLLM's SamplingParams of a request that feeds a finished sample's last token, over what is cached of it."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from hiddenlake.cache.worker.plan import KEY_ARG, TAIL_ARG

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=False,
        extra_args={KEY_ARG: key, TAIL_ARG: 1},
    )
