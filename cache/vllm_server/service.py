"""The service: follows the requests of vLLM's server, beside it in its process."""

import asyncio
import queue
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any

from vllm.exceptions import VLLMValidationError

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.vllm_server.answers import Answers, tail_params
from hiddenlake.cache.vllm_server.collector import Collector
from hiddenlake.cache.vllm_server.committed import Committed
from hiddenlake.cache.vllm_server.intake import Intake, Ticket
from hiddenlake.cache.vllm_server.states import Asked, State

# How often stored samples are asked for while there are any.
_TICK_SECONDS = 0.02

# How long a server that shuts down waits for its last samples.
_CLOSE_SECONDS = 30.0

_CLOSED = "the server was shutting down"

_Generate = Callable[..., AsyncIterator[Any]]


class Service:
    """Stands in front of an AsyncLLM's `generate`. Ordinary requests pass through untouched.

    collector : works in a thread of its own, one job after the other.
    """

    def __init__(self, generate: _Generate, intake: Intake, collector: Collector) -> None:
        self.intake, self.collector = intake, collector
        self.states = collector.states
        self._generate = generate
        self._committed = Committed(collector.offer.lake)
        self._thread = ThreadPoolExecutor(1, "hiddenlake-collector")
        self._reader = ThreadPoolExecutor(1, "hiddenlake-committed")
        self._busy = asyncio.Event()
        self._ended: queue.SimpleQueue[Answers] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start(self._tick())

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **settings: Any) -> AsyncIterator[Any]:
        """AsyncLLM.generate. Raises VLLMValidationError, which becomes a 400, before anything is generated."""
        if not self.intake.asks(sampling_params.extra_args):
            return self._generate(prompt, sampling_params, request_id, **settings)
        try:
            ticket = self._ticket(prompt, sampling_params)
        except HiddenlakeError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return self._follow(ticket, prompt, sampling_params, request_id, settings)

    def _ticket(self, prompt: Any, params: Any) -> Ticket:
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise VLLMValidationError("only prompts of text or token ids can be captured", parameter="vllm_xargs")
        return self.intake.ticket(params.extra_args, prompt["prompt_token_ids"], params.n, params.max_tokens)

    async def _follow(
        self, ticket: Ticket, prompt: Any, params: Any, request_id: str, settings: dict[str, Any]
    ) -> AsyncIterator[Any]:
        self.states.begin(Asked(request_id, ticket.capture, ticket.keys), _names(request_id))
        answers = Answers(ticket, params)
        finished = False
        try:
            async with aclosing(self._generate(prompt, ticket.prepare(params), request_id, **settings)) as outputs:
                async for output in outputs:
                    answers.take(output)
                    if output.finished:
                        finished = True
                        self._finish(answers)
                    yield output
        finally:
            if not finished:  # after vLLM's own abort, so that no row of it comes behind
                with suppress(RuntimeError):  # the server is shutting down
                    self._thread.submit(self.collector.drop, ticket.keys, "the request ended before its answer did")

    def _finish(self, answers: Answers) -> None:
        unfed = answers.unfed(self.intake.offer.model.context, feeds_last=True)
        if unfed:
            self._start(self._finish_with_tails(answers, unfed))
        else:
            self._store(answers)

    async def _finish_with_tails(self, answers: Answers, unfed: list[tuple[str, Any]]) -> None:
        async def feed(key: str, sequence: list[int]) -> None:
            prompt = {"type": "token", "prompt_token_ids": sequence}
            async for _ in self._generate(prompt, tail_params(key), f"{key}-last"):
                pass

        # one that fails leaves its sample without that row, which says so when it is stored
        await asyncio.gather(*(feed(key, sequence) for key, sequence in unfed), return_exceptions=True)
        self._store(answers)

    def _store(self, answers: Answers) -> None:
        self._ended.put(answers)
        try:
            self._thread.submit(self._store_ended)
        except RuntimeError:
            self.states.fail(answers.ticket.keys, _CLOSED)
        self._busy.set()

    def _store_ended(self) -> None:
        """In the collector's thread: all that has ended by now, in one go."""
        ended = []
        with suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait())
        if ended:
            self.collector.finish(ended)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._busy.wait()
            self._busy.clear()
            try:
                busy = await loop.run_in_executor(self._thread, self.collector.work)
            except RuntimeError:  # the service is closed
                return
            if busy:
                self._busy.set()
            await asyncio.sleep(_TICK_SECONDS)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def state(self, key: str, wait: float) -> State | None:
        """Of one sample, once it is no longer pending or `wait` seconds are over. None where it is not known."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        found = self.states.get(key)
        while found is not None and found.state == "pending" and loop.time() < deadline:
            await asyncio.sleep(_TICK_SECONDS)
            found = self.states.get(key)
        if found is None:
            capture = await loop.run_in_executor(self._reader, self._committed.find, key)
            found = None if capture is None else State("committed", capture)
        return found

    async def flush(self) -> None:
        """Publish everything that has finished."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.collector.flush)

    async def stats(self) -> list[dict[str, int]]:
        """What each worker counts: see CaptureExtension.hiddenlake_stats."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.collector.stats)

    def close(self) -> None:
        """Publish what there is, and take nothing any more. Not to be called on the event loop, which it needs."""
        closing = self._thread.submit(self.collector.close)
        self._thread.shutdown(wait=False)
        closing.result(timeout=_CLOSE_SECONDS)


def _names(request_id: str) -> list[str]:
    """What a client may call its request: the id in the response, or the X-Request-Id that it was made from."""
    response = re.sub(r"^(cmpl-.*)-\d+$|^(resp_.*)_\d+$", r"\1\2", request_id)
    return list(dict.fromkeys([response, re.sub(r"^(chatcmpl|cmpl)-", "", response)]))
