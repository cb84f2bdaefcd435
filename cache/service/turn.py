"""Turn: one group's way from the queue through a worker's engine into its capture."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.identity import Identity
from hiddenlake.cache.job import Job
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.run import Run
from hiddenlake.cache.samples import Judgement, Prompt, Question, token_checksum
from hiddenlake.cache.service.logs import event
from hiddenlake.cache.service.plans import TASK, Plan
from hiddenlake.cache.service.work import Group, Taken
from hiddenlake.cache.summary import Summary, Watcher

if TYPE_CHECKING:
    from hiddenlake.cache.service.worker import Worker

# A group gives way to older work of another after so long.
_TURN_SECONDS = 10.0

# How often the queue is asked for more of a group.
_ASK_SECONDS = 0.05

# Work that another living writer holds is looked at again after this.
_ELSEWHERE_SECONDS = 0.5


class _Resolved:
    """The task of what a service computes: nothing is right or wrong."""

    name, rules = TASK, "none"
    questions: Sequence[Question] = ()

    def judge(self, question: Question, answer: str) -> Judgement:
        return Judgement(None, None)


class Turn(Watcher):
    """Raises HiddenlakeError where the capture cannot be written, or the engine cannot serve its plan."""

    def __init__(self, worker: "Worker", group: Group, plan: Plan) -> None:
        self._worker, self._group = worker, group
        self._name, self._writer = worker.writer(group, plan)
        model, settings = worker.model, worker.settings
        tokens = None if plan.tokens is None else Tokens.parse(plan.tokens)
        request = replace(
            worker.request,
            sites=plan.sites,
            layers=plan.layers,
            positions=plan.positions,
            tokens=tokens,
            decoding=plan.decoding,
        )
        worker.engine.serve(request)
        identity = Identity(**worker.offer.identity, task=TASK, judge="none", decoding=plan.decoding)
        job = Job(_Resolved(), identity, plan.coverage(worker.offer), request, (), ())
        self._summary = Summary(self._name, 0, 0)
        self._run = Run(job, worker.engine, self._writer, self._summary, self, settings.publish)
        self._model = model
        self._taken: dict[str, Taken] = {}
        self._since = time.monotonic()
        self._asked = 0.0
        self._counted = self._answered = self._failed = 0

    def go(self) -> None:
        worker = self._worker
        try:
            self._run.follow(self._source)
            self._writer.flush()
            self.published()
        except HiddenlakeError as error:
            # The engine has ended, or goes on with what cannot be stored any more: a worker begins anew after that.
            event("turn failed", worker=worker.id, capture=self._name, kind=type(error).__name__)
            self._settle()
            cause = str(error).replace(f"{worker.lake}/", "")
            worker.work.finish(worker.id, (), [(one, cause) for one in self._taken.values()])
            worker.drop_writer(self._name)
            raise
        finally:
            self._run.close()
            if worker.tracer is not None:
                about = {"hiddenlake.capture": self._name, "hiddenlake.answers": self._answered,
                         "hiddenlake.failures": self._failed, "hiddenlake.tokens": self._counted}  # fmt: skip
                seconds = time.monotonic() - self._since
                worker.tracer.record("turn", seconds, about, failed=sys.exception() is not None)
        if self._taken:  # given up by the run, and neither committed nor failed: somebody else's turn
            worker.work.give_back(worker.id, [one.number for one in self._taken.values()])

    def published(self) -> None:
        self._settle()

    def progressed(self, summary: Summary) -> None:
        self._settle()

    def left(self, prompts: Sequence[Prompt]) -> None:
        """Committed already, or another living writer's."""
        self._settle()
        held = [self._taken.pop(prompt.key) for prompt in prompts if prompt.key in self._taken]
        if held:
            self._worker.work.give_back(self._worker.id, [one.number for one in held])
            self._worker.stop.wait(_ELSEWHERE_SECONDS)

    def _settle(self) -> None:
        """Tell the queue what is committed, and what has failed."""
        committed = self._writer.committed
        done = [key for key in self._taken if key in committed]
        failed = [
            (key, cause) for key, cause in self._summary.causes.items() if key in self._taken and key not in committed
        ]
        if not done and not failed:
            return
        tokens = self._summary.tokens - self._counted + sum(len(self._taken[key].wanted.prompt) for key in done)
        self._counted = self._summary.tokens
        self._answered, self._failed = self._answered + len(done), self._failed + len(failed)
        self._worker.work.finish(
            self._worker.id,
            [(self._taken[key], self._name) for key in done],
            [(self._taken[key], cause) for key, cause in failed],
            tokens,
        )
        for key in [*done, *(key for key, _ in failed)]:
            del self._taken[key]

    def _source(self, most: int) -> list[Prompt]:
        """More work of the group, while it is its turn."""
        worker, now = self._worker, time.monotonic()
        if worker.stop.is_set() or now - self._asked < _ASK_SECONDS:
            return []
        self._asked = now
        if now - self._since > _TURN_SECONDS and worker.work.oldest(worker.offer.id) != self._group:
            return []
        taken = worker.work.take(worker.id, worker.offer.id, self._group, most, worker.settings.lease)
        self._taken |= {one.wanted.key: one for one in taken}
        return [self._prompt(one) for one in taken]

    def _prompt(self, one: Taken) -> Prompt:
        wanted = one.wanted
        text = self._model.decode(wanted.prompt)
        # Answers to one prompt never lie on both sides of a split.
        question = Question(one.number, text, (), group=token_checksum(wanted.prompt))
        return Prompt(wanted.key, question, 0, text, wanted.prompt, wanted.given, wanted.seed)
