"""Churn: one engine and one capture under random load. What was asked for is aborted at random, asked for again, and
stored in random order."""

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from _processes import Processes

from hiddenlake.cache.engines.vllm import VllmEngine
from hiddenlake.cache.job import Job
from hiddenlake.cache.placing import Placed, make_sample
from hiddenlake.cache.samples import Generation, Prompt, Sample
from hiddenlake.cache.shelf import Settled, Shelf
from hiddenlake.cache.store.writer import Writer

# A quarter of the generations is meant to be aborted; half of those that were are asked for again.
_ABORTED, _AGAIN = 0.25, 0.5

# Steps until an abort, on average: about as many as a request takes from the queue to its end.
_PATIENCE = 30

# What is finished waits for some steps, so that it is stored in another order, and may be aborted meanwhile.
_STORED = 0.3

_ATTEMPTS = 2

# Kept of what goes wrong.
_CAUSES = 10

# Looks at the processes.
_LOOKS = 100

FEEDING, FINISHED = "feeding the last token", "finished, not stored"
MOMENTS = ("waiting", "prefilling", "decoding", "preempted", FEEDING, FINISHED)


@dataclass
class Counts:
    """What happened to the generations of one job.

    stored : keys.  abandoned : aborted for good.  failed : could not be stored, twice.
    retried, causes : could not be stored at first, and why.  aborts : by moment.  again : asked for again after one.
    full : turns in which the engine had no room for more.  stopped : answers that a stop string ended.
    tails : last tokens that were fed behind one.
    """

    stored: set[str] = field(default_factory=set)
    abandoned: int = 0
    failed: int = 0
    retried: int = 0
    aborts: Counter[str] = field(default_factory=Counter)
    again: int = 0
    full: int = 0
    stopped: int = 0
    tails: int = 0
    causes: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.stored) + self.abandoned + self.failed


class Churn:
    """Everything that a job asks for, until each prompt is stored or was aborted on purpose."""

    def __init__(
        self, job: Job, engine: VllmEngine, writer: Writer, processes: Processes, chance: random.Random
    ) -> None:
        self.job, self.engine, self.writer = job, engine, writer
        self.shelf = Shelf(engine, writer)
        self.counts = Counts()
        self._tried: Counter[str] = Counter()
        self._chance, self._processes = chance, processes
        self._prompts = {prompt.key: prompt for prompt in job.prompts}
        self._waiting = deque(chance.sample(job.prompts, len(job.prompts)))
        self._fates: dict[str, int | str | None] = {}
        self._running: set[str] = set()
        self._feeding: set[str] = set()
        self._finished: dict[str, Generation] = {}
        self._steps = self._looked = 0
        writer.reserve(list(self._prompts), len(self._prompts))

    def run(self) -> None:
        while self._waiting or self._running or self._finished or len(self.shelf):
            while self._waiting and self.engine.has_room(self._waiting[0]):
                self._submit(self._waiting.popleft())
            self.counts.full += bool(self._waiting)
            if self._running:
                self._step()
            self._abort()
            self._store()
            if self.counts.done * _LOOKS >= self._looked * len(self._prompts):
                self._processes.look(self.counts.done)
                self._looked += 1

    def _submit(self, prompt: Prompt) -> None:
        tokens = None
        if prompt.given is not None:
            nothing = (0.0,) * len(prompt.given)
            tokens = self._sample(Generation(prompt.key, prompt.given, nothing, "given"))[1].tokens_needed()
        self.engine.submit(prompt, tokens)
        self._running.add(prompt.key)
        self._fates[prompt.key] = self._fate()

    def _fate(self) -> int | str | None:
        """The step before which a request is to be aborted, or what it must do first, or None."""
        if self._chance.random() >= _ABORTED:
            return None
        step = self._steps + int(self._chance.expovariate(1 / _PATIENCE))
        return self._chance.choice([step, step, step, FEEDING, FINISHED])

    def _step(self) -> None:
        self._steps += 1
        for generation in self.engine.step():
            self._finished[generation.key] = generation
            self._running.remove(generation.key)
            self.counts.stopped += generation.text is not None
        feeding = {tail.removesuffix(":last") for tail in self.engine._tails}
        self.counts.tails += len(feeding - self._feeding)
        self._feeding = feeding

    def _abort(self) -> None:
        moments = dict.fromkeys(
            sorted(key for key in self._feeding & self._running if self._fates[key] == FEEDING), FEEDING
        )
        due = [key for key, fate in self._fates.items() if isinstance(fate, int) and fate <= self._steps]
        if running := [key for key in due if key in self._running and key not in self._feeding]:
            moments |= self.engine._call("soak_moments", running)[0]
        moments |= {key: FEEDING for key in due if key in self._feeding & self._running}
        moments |= {key: FINISHED for key in self._finished if self._fates[key] == FINISHED or key in due}
        if not moments:
            return
        self.engine.abort(list(moments))
        self.counts.aborts.update(moments.values())
        for key in moments:
            self._running.discard(key)
            self._feeding.discard(key)
            self._finished.pop(key, None)
            del self._fates[key]
            if self._chance.random() < _AGAIN:
                self.counts.again += 1
                self._waiting.insert(self._chance.randrange(len(self._waiting) + 1), self._prompts[key])
            else:
                self.counts.abandoned += 1

    def _store(self) -> None:
        idle = not self._running
        keys = [key for key in self._finished if idle or self._chance.random() < _STORED]
        self._chance.shuffle(keys)
        for key in keys:
            del self._fates[key]
        self._settle(self.shelf.place([self._sample(self._finished.pop(key)) for key in keys]))
        if idle:
            self._settle(self.shelf.wait())

    def _sample(self, generation: Generation) -> tuple[Sample, Placed]:
        prompt, model = self._prompts[generation.key], self.job.request.model
        answer = model.decode_answer(generation.answer_ids) if generation.text is None else generation.text
        judgement = self.job.task.judge(prompt.question, answer)
        return make_sample(model, self.job.coverage, prompt, generation, answer, judgement)

    def _settle(self, settled: Sequence[Settled]) -> None:
        for sample, _, cause in settled:
            if cause is None:
                self.counts.stored.add(sample.key)
                continue
            self._tried[sample.key] += 1
            self.counts.causes = [*self.counts.causes, cause][:_CAUSES]
            if self._tried[sample.key] < _ATTEMPTS:
                self.counts.retried += 1
                self._waiting.append(self._prompts[sample.key])
            else:
                self.counts.failed += 1
