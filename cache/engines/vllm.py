"""vLLM: generates in continuous batches while the taps in its workers capture."""

from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.engines import vllm_setup as setup
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.engines.ranks import Ranks
from hiddenlake.cache.engines.vllm_canary import canary_arguments, canary_params, judge_canary
from hiddenlake.cache.engines.vllm_config import QUEUE, configure
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.inquiry import Ask, Reply
from hiddenlake.cache.positions import wanted
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.worker.plan import (
    CANARY,
    KEY_ARG,
    LAST_TOKEN_ARG,
    POSITIONS_ARG,
    PROMPT_LENGTH_ARG,
    TAIL_ARG,
    TOKENS_ARG,
    Placement,
)  # fmt: skip


class VllmEngine:
    """An LLMEngine whose workers have the taps, driven step by step. See Engine for the interface."""

    def __init__(self, request: Request) -> None:
        setup.import_vllm()
        from vllm.lora.request import LoRARequest

        self.request = request
        self._config, self.memory = configure(request)
        self._first = request
        # given texts, and answers to short prompts, may need far fewer rows than the longest; what is pooled does not
        pooled = not request.varying and wanted(request.positions, request.tokens, request.max_length).pools
        self._most_samples = self.memory.samples if pooled else QUEUE * self._config.scheduler_config.max_num_seqs
        self._most_rows = self.memory.samples * request.rows_per_sample
        if request.varying:
            self._most_rows = request.ring_bytes // request.row_bytes
        self._engine: Any = None
        self._ranks = self._config.parallel_config.world_size
        self._sampling = self._sampling_of(request)
        self._lora = LoRARequest("lora", 1, request.lora) if request.lora is not None else None
        self._reserved: dict[str, int] = {}
        self._prompts: dict[str, Prompt] = {}
        self._tails: dict[str, Generation] = {}
        self._asked: dict[str, tuple[str, int]] = {}
        self._replies: list[tuple[str, Reply]] = []
        self._reports = Ranks(self._ranks)
        self._last: set[str] = set()
        self.provenance = setup.provenance(self._config)

    def serve(self, request: Request) -> None:
        self._first.check_may_follow(request)
        self.request, self._sampling = request, self._sampling_of(request)

    def _sampling_of(self, request: Request) -> Any:
        given = request.decoding.max_new_tokens == 0
        return self._params(
            request.decoding.sampling,
            max(1, request.decoding.max_new_tokens),
            logprobs=None if given else 0,
            skip_reading_prefix_cache=True,
        )

    def _params(self, sampling: Sampling, max_tokens: int, **settings: Any) -> Any:
        """vLLM's SamplingParams."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=list(sampling.stop),
            max_tokens=max_tokens,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            stop_token_ids=list(self.request.model.end_ids),
            **settings,
        )

    def start(self, canary: Sequence[int]) -> None:
        try:
            self._engine = setup.start(self._config)
            self._check_canary(tuple(canary))
        except BaseException:
            self.close()
            raise

    def _check_canary(self, ids: tuple[int, ...]) -> None:
        """Send one prompt through, and refuse to go on unless every tap answers for it: see vllm_canary."""
        if self._lora is not None:
            setup.load_adapter(self._engine, self._lora)
        # behind its answer one position more, without which vLLM would end before the last token is fed
        ids = ids[: setup.longest_sequence(self._first) - setup.CANARY_TOKENS - 1]
        self._engine.add_request(CANARY, {"prompt_token_ids": list(ids)}, canary_params(), lora_request=self._lora)
        finished: list[Generation] = []
        while not finished:
            finished = self.step()
        answer = finished[0]
        reports = self._call("hiddenlake_canary", *canary_arguments(ids, answer.answer_ids))
        judge_canary(reports, answer.logprobs[0], self.request.model.dtype)
        self._call("hiddenlake_drop", [CANARY])

    def has_room(self, prompt: Prompt) -> bool:
        rows = sum(self._reserved.values()) + self._rows(prompt)
        # what alone is more than the ring holds is spilled, if it may be
        fits = rows <= self._most_rows or (self._first.varying and not self._reserved)
        return len(self._reserved) < self._most_samples and fits

    @property
    def ring_used(self) -> float:
        return min(1.0, sum(list(self._reserved.values())) / max(1, self._most_rows))

    def _rows(self, prompt: Prompt) -> int:
        return self.request.rows(len(prompt.token_ids), None if prompt.given is None else len(prompt.given))

    def submit(self, prompt: Prompt, tokens: Sequence[int] | None = None) -> None:
        params = self._sampling.clone()
        ids, q = list(prompt.token_ids), len(prompt.token_ids)
        params.extra_args = {KEY_ARG: prompt.key}
        if self._first.varying:
            every = () if self.request.tokens is None else (str(self.request.tokens),)
            params.extra_args[POSITIONS_ARG] = [*self.request.positions, *every]
        if tokens is not None:
            params.extra_args[TOKENS_ARG] = list(tokens)
        if prompt.given is not None:
            params.extra_args[PROMPT_LENGTH_ARG] = q
            params.prompt_logprobs = 0 if prompt.given else None
            ids += prompt.given
        else:
            want = wanted(self.request.positions, self.request.tokens, q)
            params.extra_args[LAST_TOKEN_ARG] = int(want.last)
            params.seed = prompt.seed_of(self.request.decoding.sampling)
        self._engine.add_request(prompt.key, {"prompt_token_ids": ids}, params, lora_request=self._lora)
        self._reserved[prompt.key] = self._rows(prompt) if tokens is None else len(tokens)
        self._prompts[prompt.key] = prompt

    def ask(self, key: str, token_ids: Sequence[int], ask: Ask, seed: int | None) -> None:
        params = self._params(ask.sampling, ask.max_new_tokens, seed=seed)
        self._engine.add_request(_ask(key), {"prompt_token_ids": list(token_ids)}, params, lora_request=self._lora)
        self._asked[_ask(key)] = key, len(token_ids)

    def replies(self) -> list[tuple[str, Reply]]:
        found, self._replies = self._replies, []
        return found

    def abort(self, keys: Sequence[str]) -> None:
        """Stop samples that are not finished, and forget them."""
        others = [_tail(key) for key in keys if _tail(key) in self._tails]
        others += [_ask(key) for key in keys if _ask(key) in self._asked]
        self._engine.abort_request([*keys, *others])
        self._replies = [reply for reply in self._replies if reply[0] not in keys]
        self._call("hiddenlake_drop", list(keys))
        for key in keys:
            self._forget(key)

    def step(self) -> list[Generation]:
        finished = self._finished()
        # The engine runs ahead in its own process: take all that is ready, since each call to its worker waits
        # for the step that it is in.
        while setup.is_ready(self._engine):
            finished += self._finished()
        return finished

    def _finished(self) -> list[Generation]:
        with setup.reported_death():
            outputs = self._engine.step()
        found = []
        for output in outputs:
            if not output.finished:
                continue
            if output.request_id in self._tails:
                found.append(self._tails.pop(output.request_id))
                continue
            if output.request_id in self._asked:
                self._replies.append(self._reply(output))
                continue
            generation = self._generation(output)
            if generation.text is not None and self._feed_last(generation):
                continue
            found.append(generation)
        return found

    def _reply(self, output: Any) -> tuple[str, Reply]:
        key, length = self._asked.pop(output.request_id)
        [answer] = output.outputs
        text = (
            answer.text if isinstance(answer.stop_reason, str) else self.request.model.decode_answer(answer.token_ids)
        )
        return key, Reply(text, str(answer.finish_reason) == "stop", length, len(answer.token_ids))

    def _feed_last(self, generation: Generation) -> bool:
        """Whether the last token behind a stop string is being fed: the request itself ended without it."""
        prompt = self._prompts[generation.key]
        ids = [*prompt.token_ids, *generation.answer_ids]
        want = wanted(self.request.positions, self.request.tokens, len(prompt.token_ids))
        if not want.last or len(ids) == self.request.model.context:  # no position is left to feed it at
            return False
        params = self._sampling.clone()
        params.max_tokens, params.logprobs, params.stop, params.detokenize = 1, None, [], False
        params.skip_reading_prefix_cache = False
        params.extra_args = {KEY_ARG: generation.key, TAIL_ARG: 1}
        tail = _tail(generation.key)
        self._engine.add_request(tail, {"prompt_token_ids": ids}, params, lora_request=self._lora)
        self._tails[tail] = generation
        return True

    def _call(self, verb: str, *arguments: Any) -> list[Any]:
        """Call a verb of the workers' CaptureExtension. Returns each rank's answer."""
        with setup.reported_death():
            return self._engine.collective_rpc(verb, args=arguments)

    def _generation(self, output: Any) -> Generation:
        if output.num_cached_tokens:
            raise CaptureError(
                f"{output.num_cached_tokens} tokens of a captured request came from the prefix cache: their rows were "
                f"not computed"
            )
        [answer] = output.outputs
        prompt = self._prompts.get(output.request_id)
        if prompt is not None and prompt.given is not None:
            q = len(prompt.token_ids)
            logprobs = tuple(output.prompt_logprobs[q + i][token].logprob for i, token in enumerate(prompt.given))
            return Generation(output.request_id, prompt.given, logprobs, "given")
        ids = tuple(answer.token_ids)
        return Generation(
            key=output.request_id,
            answer_ids=ids,
            logprobs=tuple(step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)),
            finish_reason=str(answer.finish_reason),
            text=answer.text if isinstance(answer.stop_reason, str) else None,
        )

    def store(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> list[tuple[str, str | None]]:
        self._last.update(placement.key for placement in placements if placement.done)
        return self._merge(
            self._call("hiddenlake_store", list(handles), [placement.to_json() for placement in placements])
        )

    def stored(self, wait: bool) -> list[tuple[str, str | None]]:
        return self._merge(self._call("hiddenlake_stored", wait))

    def _merge(self, found: list[list[tuple[str, str | None]]]) -> list[tuple[str, str | None]]:
        merged = self._reports.merge(found)
        for key, cause in merged:
            if cause is not None or key in self._last:
                self._forget(key)
        return merged

    def _forget(self, key: str) -> None:
        self._last.discard(key)
        self._reserved.pop(key, None)
        self._prompts.pop(key, None)
        self._tails.pop(_tail(key), None)
        self._asked.pop(_ask(key), None)

    def stats(self) -> list[dict[str, int]]:
        """What each rank counts: see CaptureExtension.hiddenlake_stats."""
        return self._call("hiddenlake_stats")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()


def _tail(key: str) -> str:
    return f"{key}:last"


def _ask(key: str) -> str:
    return f"{key}:ask"
