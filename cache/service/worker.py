"""Worker: an engine that computes what is asked for, until it is told to stop."""

import os
import secrets
import signal
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.engines.base import Engine, Request
from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.identity import Decoding, Identity
from hiddenlake.cache.job import Job
from hiddenlake.cache.model import Model, load_model
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.run import Run
from hiddenlake.cache.samples import Judgement, Prompt, Question, token_checksum
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.logs import event
from hiddenlake.cache.service.plans import TASK, Offer, Plan
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.service.work import Group, Taken, Work
from hiddenlake.cache.sites import SITES, parse_layers, parse_sites
from hiddenlake.cache.store.coverage import EMBED
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.summary import Summary, Watcher

# How often an idle worker looks for work, and a busy one for more.
_IDLE_SECONDS = 0.05

# A group gives way to older work of another after so long.
_TURN_SECONDS = 10.0

# Captures that stay open for writing; each has shard buffers of its own.
_OPEN_CAPTURES = 4

# A capture is left when nothing came for it for so long.
_LEFT_SECONDS = 30.0

# How a worker ends that could not finish what it had.
_DRAINED = 75

# Any prompt will do.
_CANARY = "Which country is the city of Paris in?"

# Work that another living writer holds is looked at again after this.
_ELSEWHERE_SECONDS = 0.5


class _Resolved:
    """The task of what a service computes: nothing is right or wrong."""

    name, rules = TASK, "none"
    questions: Sequence[Question] = ()

    def judge(self, question: Question, answer: str) -> Judgement:
        return Judgement(None, None)


class Worker:
    """One engine at work on one lake's queue.

    stop : set to end it: what is in flight is finished, the rest given back.
    """

    def __init__(self, lake: str | Path, model: str, settings: Settings) -> None:
        self.lake, self.settings = Path(lake), settings
        self.id = secrets.token_hex(8)
        self.stop = threading.Event()
        self.model = load_model(model, settings.dtype)
        self.work = Work(Database(lake))
        self.request = _widest(self.model, settings, self.lake)
        self.offer = _offer(self.model, self.request, settings)
        self._engine: Engine | None = None
        self._writers: OrderedDict[str, Writer] = OrderedDict()
        self._used: dict[str, float] = {}

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Until `stop` is set. ready : called once the engine has passed its canary. Raises HiddenlakeError."""
        _, ids = self.model.encode(_CANARY)
        self._engine = start_engine(self.settings.engine, self.request, ids)
        self.work.join(self.id, self.offer)
        beating = threading.Thread(target=self._beat, daemon=True)
        ended = threading.Event()
        self._ended = ended
        beating.start()
        event("worker ready", worker=self.id, model=self.offer.id)
        if ready is not None:
            ready()
        try:
            while not self.stop.is_set():
                self.work.reclaim(self.settings.attempts)
                group = self.work.oldest(self.offer.id)
                if group is None:
                    self._close_idle()
                    self.stop.wait(_IDLE_SECONDS)
                else:
                    self._turn(group)
        finally:
            ended.set()
            beating.join()
            self.work.leave(self.id)
            for name in list(self._writers):
                self.drop_writer(name)
            self._engine.close()

    def _beat(self) -> None:
        while not self._ended.wait(self.settings.lease / 4):
            try:
                self.work.beat(self.id, self.settings.lease, self._engine.ring_used)
            except sqlite3.Error as error:  # one that is missed is no death: the lease is four of them
                event("beat missed", worker=self.id, kind=type(error).__name__)

    def _turn(self, group: Group) -> None:
        """Work on one group until there is no more of it, or it must give way."""
        plan = self.work.plan(group.plan)
        try:
            turn = _Turn(self, group, plan)
        except HiddenlakeError as error:  # of the capture: its disk is full, or it is damaged
            self._fail_all(group, error)
            return
        turn.go()

    def _fail_all(self, group: Group, error: HiddenlakeError) -> None:
        event("group failed", worker=self.id, plan=group.plan, kind=type(error).__name__)
        taken = self.work.take(self.id, self.offer.id, group, 1 << 30, self.settings.lease)
        cause = str(error).replace(f"{self.lake}/", "")
        self.work.finish(self.id, (), [(one, cause) for one in taken])

    def writer(self, group: Group, plan: Plan) -> tuple[str, Writer]:
        """(name, writer) of the capture that a group's answers go into. Raises StoreError, IdentityError."""
        name = plan.capture(self.offer, group.tenant)
        self._used[name] = time.monotonic()
        if name in self._writers:
            self._writers.move_to_end(name)
            return name, self._writers[name]
        while len(self._writers) >= _OPEN_CAPTURES:
            self.drop_writer(next(iter(self._writers)))
        writer = open_writer(
            self.lake / name,
            identity=plan.identity(self.offer, group.tenant),
            coverage=plan.coverage(self.offer),
            provenance=self._engine.provenance,
            planned=0,
            buffer_bytes=self.settings.buffer_bytes,
            shard_samples=self.settings.shard_samples,
            shared=True,
        )
        self._writers[name] = writer
        return name, writer

    def _close_idle(self) -> None:
        """Leave captures that nothing came for lately: what is being written can be neither removed nor compacted."""
        for name, since in list(self._used.items()):
            if time.monotonic() - since > _LEFT_SECONDS:
                self.drop_writer(name)

    def drop_writer(self, name: str) -> None:
        """One that has failed: it only refuses from then on."""
        writer = self._writers.pop(name, None)
        self._used.pop(name, None)
        if writer is not None:
            try:
                writer.close()
            except HiddenlakeError as error:
                event("capture left", worker=self.id, capture=name, kind=type(error).__name__)


class _Turn(Watcher):
    """One group's turn: from the queue through the engine into the capture."""

    def __init__(self, worker: Worker, group: Group, plan: Plan) -> None:
        self._worker, self._group = worker, group
        self._name, self._writer = worker.writer(group, plan)
        model, settings = worker.model, worker.settings
        self._request = _request(worker.request, plan)
        worker._engine.serve(self._request)
        identity = Identity(
            **{k: v for k, v in worker.offer.identity.items()}, task=TASK, judge="none", decoding=plan.decoding
        )
        job = Job(_Resolved(), identity, plan.coverage(worker.offer), self._request, (), ())
        self._summary = Summary(self._name, 0, 0)
        self._run = Run(job, worker._engine, self._writer, self._summary, self, settings.publish)
        self._model, self._plan = model, plan
        self._taken: dict[str, Taken] = {}
        self._since = time.monotonic()
        self._asked = 0.0
        self._counted = 0

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
        if worker.stop.is_set() or now - self._asked < _IDLE_SECONDS:
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


def _widest(model: Model, settings: Settings, lake: Path) -> Request:
    """What bounds everything that this worker may be asked. Raises BadInputError, UnknownNameError."""
    sites, named = parse_sites(settings.sites.split(","), model.family)
    layers = parse_layers(named if named is not None else settings.layers, model.n_layers)
    return Request(
        model=model,
        sites=sites,
        layers=layers,
        positions=(),
        tokens=None,
        decoding=Decoding(settings.max_new_tokens),
        max_length=min(model.context, settings.max_prompt + settings.max_new_tokens),
        ring_bytes=settings.ring_bytes,
        lora=None,
        options=dict(settings.engine_options),
        varying=True,
        spill=str(lake),
    )


def _offer(model: Model, request: Request, settings: Settings) -> Offer:
    identity = Identity(
        model=model.name, weights=model.weights, quantization=model.quantization, lora=None, compute_dtype=model.dtype,
        stored_dtype=model.dtype, chat_template=model.chat_template, task=TASK, judge="none", decoding=request.decoding,
    ).to_json()  # fmt: skip
    for own in ("task", "judge", "decoding"):
        del identity[own]
    longest = min(settings.max_new_tokens, model.context - 1)
    return Offer(
        path=str(Path(model.path).absolute()) if Path(model.path).is_dir() else model.path,
        identity=identity,
        sites=request.sites,
        layers=request.layers,
        widths={site: model.widths[SITES[site].width] for site in (*request.sites, EMBED)},
        dtype=model.dtype,
        max_prompt=min(settings.max_prompt, model.context - longest),
        max_new_tokens=longest,
        vocabulary=model.vocabulary,
    )


def _request(widest: Request, plan: Plan) -> Request:
    from dataclasses import replace

    tokens = None if plan.tokens is None else Tokens.parse(plan.tokens)
    return replace(
        widest, sites=plan.sites, layers=plan.layers, positions=plan.positions, tokens=tokens, decoding=plan.decoding
    )


def work_on(lake: str | Path, model: str, settings: Settings, ready: Callable[[Offer], None] | None = None) -> None:
    """Run a worker until SIGTERM or SIGINT. What is in flight is finished; a second signal ends it at once.

    Raises HiddenlakeError.
    """
    worker = Worker(lake, model, settings)

    def end(number: int, frame: Any) -> None:
        worker.stop.set()
        signal.signal(number, signal.SIG_DFL)
        # What has not ended by then is another worker's, once this process is gone.
        timer = threading.Timer(settings.drain, os._exit, (_DRAINED,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    worker.run(None if ready is None else lambda: ready(worker.offer))
