"""Run: one engine and one writer at work on one task, from its prompts to its committed samples."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from hiddenlake.cache.asking import Asking, EngineAsker, Judged
from hiddenlake.cache.chat_server import ChatAsker
from hiddenlake.cache.engines.base import Engine
from hiddenlake.cache.job import Job
from hiddenlake.cache.placing import Placed, make_sample
from hiddenlake.cache.samples import Failure, Generation, Judgement, Prompt, Sample
from hiddenlake.cache.shelf import Settled, Shelf
from hiddenlake.cache.store.writer import Writer
from hiddenlake.cache.summary import Summary, Watcher

# Samples reserved at a time: enough to keep an engine busy, few enough for several writers to share a small task.
_RESERVE = 64

# Gives up to so many prompts that are to be worked on next; none where there are none just now.
Source = Callable[[int], Sequence[Prompt]]

# A generation is cheap beside a lost sample, and a second failure is not chance.
_ATTEMPTS = 2


def fail(writer: Writer, summary: Summary, prompt: Prompt, cause: str, attempts: int) -> None:
    """Record a sample that is given up after so many attempts."""
    writer.fail(Failure(prompt.key, prompt.question.index, cause, attempts))
    summary.failed += 1
    summary.causes[prompt.key] = cause


class Run:
    """One engine and one writer at work on one task.

    publish_seconds : samples are published this long after the first of them is there, in shards that are not full; None
        for when their shard is.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        writer: Writer,
        summary: Summary,
        watcher: Watcher,
        publish_seconds: float | None = None,
    ) -> None:
        self.job, self.model = job, job.request.model
        self.engine, self.writer, self.summary, self.watcher = engine, writer, summary, watcher
        self.sample_bytes = writer.layout.shard_bytes // writer.shard_samples
        self.in_flight: dict[str, Prompt] = {}
        self.shelf = Shelf(engine, writer)
        self.attempts: dict[str, int] = {}
        self._publish_seconds = publish_seconds
        self._unpublished: float | None = None
        follow_up, asker = job.follow_up, None
        if follow_up is not None:
            asker = ChatAsker(follow_up.served) if follow_up.served else EngineAsker(engine, follow_up.longest)
        self.asking = Asking(follow_up, asker)
        summary.asked = self.asking.asked

    def go(self, pending: Sequence[Prompt]) -> None:
        """Until all are committed or given up, but for what the writer has not flushed."""
        rest = iter(pending)
        self.follow(lambda most: list(islice(rest, most)))

    def follow(self, source: Source) -> None:
        """The same, of what a source gives, until it gives nothing while nothing is in flight."""
        waiting: deque[Prompt] = deque()
        while True:
            waiting.extend(self._publish_due())
            while waiting or waiting.extend(self._reserve(source)) or waiting:
                if not self.engine.has_room(waiting[0]):
                    break
                self._submit(waiting.popleft())
            if not self.in_flight:
                return
            running = len(self.in_flight) - len(self.shelf) - len(self.asking)
            if not running and not len(self.asking):
                waiting.extend(self._settle(self.shelf.wait()))
                continue
            # an engine without work would step for ever
            busy = running or self.asking.in_engine
            judged = self._judge(self.engine.step() if busy else (), wait=not busy)
            waiting.extend(self._settle(self.shelf.place([self._sample(*item) for item in judged])))

    def close(self) -> None:
        """Ask no more."""
        self.asking.close()

    def _reserve(self, source: Source) -> list[Prompt]:
        """Prompts that no other writer works on; none where the source has none."""
        while block := source(_RESERVE):
            by_key = {prompt.key: prompt for prompt in block}
            mine = self.writer.reserve(list(by_key), len(by_key))
            others = by_key.keys() - set(mine)
            self.summary.elsewhere += sum(key not in self.writer.committed for key in others)
            if others:
                self.watcher.left([by_key[key] for key in others])
            if mine:
                return [by_key[key] for key in mine]
        return []

    def _publish_due(self) -> list[Prompt]:
        """Publish what has waited for long enough. Returns the prompts to try again."""
        if self._unpublished is None or time.monotonic() - self._unpublished < self._publish_seconds:
            return []
        retry = self._settle(self.shelf.wait())
        self._unpublished = None
        self.writer.flush()
        self.watcher.published()
        return retry

    def _submit(self, prompt: Prompt) -> None:
        self.in_flight[prompt.key] = prompt
        tokens = None
        if prompt.given is not None:
            # all is known of given text, so only what will be stored is kept
            nothing = (0.0,) * len(prompt.given)
            [judged] = self._judge([Generation(prompt.key, prompt.given, nothing, "given")])
            _, placed = self._sample(*judged)
            tokens = placed.tokens_needed()
        self.engine.submit(prompt, tokens)

    def _judge(self, generations: Sequence[Generation], wait: bool = False) -> Sequence[Judged]:
        """Mark answers. Returns those about which nothing is left to ask, earlier ones too. wait : for one of them."""
        for generation in generations:
            prompt = self.in_flight[generation.key]
            answer = self.model.decode_answer(generation.answer_ids) if generation.text is None else generation.text
            self.asking.begin(prompt, generation, answer, self.job.task.judge(prompt.question, answer))
        return self.asking.ended(wait)

    def _sample(self, generation: Generation, answer: str, judgement: Judgement) -> tuple[Sample, Placed]:
        prompt = self.in_flight[generation.key]
        return make_sample(self.model, self.job.coverage, prompt, generation, answer, judgement)

    def _settle(self, settled: Sequence[Settled]) -> list[Prompt]:
        """Count what is settled. Returns the prompts to try again."""
        retry = []
        for sample, placed, cause in settled:
            prompt = self.in_flight.pop(sample.key)
            if cause is None:
                if self._publish_seconds is not None and self._unpublished is None:
                    self._unpublished = time.monotonic()
                self.summary.committed += 1
                self.summary.correct += bool(sample.correct)
                self.summary.tokens += sample.total_length - sample.prompt_length
                self.summary.bytes += self.sample_bytes + len(placed.tokens) * self.writer.layout.token_bytes
                continue
            tried = self.attempts[sample.key] = self.attempts.get(sample.key, 0) + 1
            if tried < _ATTEMPTS:
                retry.append(prompt)
            else:
                fail(self.writer, self.summary, prompt, cause, tried)
        if settled:
            self.watcher.progressed(self.summary)
        return retry
