"""Worker: an engine that computes what is asked for, until it is told to stop."""

import os
import secrets
import signal
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.engines.base import Engine, Request
from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.identity import Decoding, Identity
from hiddenlake.cache.model import Model, load_model
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.logs import event
from hiddenlake.cache.service.plans import TASK, Offer, Plan
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.service.tracing import Tracer
from hiddenlake.cache.service.turn import Turn
from hiddenlake.cache.service.work import Group, Work
from hiddenlake.cache.sites import SITES, parse_layers, parse_sites
from hiddenlake.cache.store.coverage import EMBED
from hiddenlake.cache.store.writer import Writer, open_writer

# How often an idle worker looks for work.
_IDLE_SECONDS = 0.05

# Captures that stay open for writing; each has shard buffers of its own.
_OPEN_CAPTURES = 4

# A capture is left when nothing came for it for so long.
_LEFT_SECONDS = 30.0

# How a worker ends that could not finish what it had.
_DRAINED = 75

# Any prompt will do.
_CANARY = "Which country is the city of Paris in?"


class Worker:
    """One engine at work on one lake's queue.

    stop : set to end it: what is in flight is finished, the rest given back.
    """

    def __init__(self, lake: str | Path, model: str, settings: Settings) -> None:
        self.lake, self.settings = Path(lake), settings
        self.id = secrets.token_hex(8)
        self.stop = threading.Event()
        self.tracer = None if settings.traces is None else Tracer(settings.traces, "worker")
        self.model = load_model(model, settings.dtype)
        self.work = Work(Database(lake))
        self.request = _widest(self.model, settings, self.lake)
        self.offer = _offer(self.model, self.request, settings)
        self.engine: Engine | None = None
        self._writers: OrderedDict[str, Writer] = OrderedDict()
        self._used: dict[str, float] = {}
        self._ended = threading.Event()

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Until `stop` is set. ready : called once the engine has passed its canary. Raises HiddenlakeError."""
        _, ids = self.model.encode(_CANARY)
        self.engine = start_engine(self.settings.engine, self.request, ids)
        self.work.join(self.id, self.offer)
        beating = threading.Thread(target=self._beat, daemon=True)
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
            self._ended.set()
            beating.join()
            self.work.leave(self.id)
            for name in list(self._writers):
                self.drop_writer(name)
            self.engine.close()
            if self.tracer is not None:
                self.tracer.close()

    def _beat(self) -> None:
        while not self._ended.wait(self.settings.lease / 4):
            try:
                self.work.beat(self.id, self.settings.lease, self.engine.ring_used)
            except sqlite3.Error as error:  # one that is missed is no death: the lease is four of them
                event("beat missed", worker=self.id, kind=type(error).__name__)

    def _turn(self, group: Group) -> None:
        """Work on one group until there is no more of it, or it must give way."""
        plan = self.work.plan(group.plan)
        try:
            turn = Turn(self, group, plan)
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
            provenance=self.engine.provenance,
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
