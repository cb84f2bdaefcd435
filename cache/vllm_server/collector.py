"""The collector: finished answers become samples, samples are stored, and what trickles in is published together."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from hiddenlake.cache.placing import Placed, make_sample
from hiddenlake.cache.samples import Failure, Generation, Judgement, Prompt, Question, Sample, token_checksum
from hiddenlake.cache.shelf import Settled, Shelf
from hiddenlake.cache.store.commits import list_commits, read_commit
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.vllm_server.answers import Answers
from hiddenlake.cache.vllm_server.intake import Offer, Ticket
from hiddenlake.cache.vllm_server.states import States
from hiddenlake.cache.vllm_server.workers import Workers

# A published shard is a whole shard on disk, however few samples are in it; a client waits for its publishing.
PUBLISH_SECONDS = 2.0

# Each has shard buffers of its own.
_OPEN_CAPTURES = 8

# (prompt, answer) as text
Judge = Callable[[str, str], Judgement]


@dataclass(slots=True)
class _Open:
    """A capture that is being written.

    row : of its first request since the start.  used : when it was used last.
    added : keys that are not committed yet.  since : when the first of them came.
    """

    name: str
    writer: Writer
    shelf: Shelf
    row: int
    added: set[str] = field(default_factory=set)
    since: float = 0.0
    used: float = 0.0


class Collector:
    """Stores the samples of one engine's requests. Not thread-safe, but for `states`: it belongs to one thread.

    None of its methods raises for what goes wrong with a capture: the samples fail, with the cause.

    provenance : kept with each commit.  judge : marks answers and finds the exact one in them.
    """

    def __init__(self, offer: Offer, workers: Workers, provenance: dict[str, Any], judge: Judge | None = None) -> None:
        self.offer = offer
        self.states = States()
        self._identity, self._provenance = offer.identity.to_json(), provenance
        self._workers = workers
        self._judge = judge
        self._captures: dict[str, _Open] = {}
        self._rows: dict[str, int] = {}

    def open(self, name: str, coverage: Coverage) -> None:
        """Open a capture, or create it, before its first sample comes. Raises StoreError, IdentityError."""
        self._open(name, coverage)

    def finish(self, ended: Sequence[Answers]) -> None:
        """Requests have ended: store their samples."""
        for name in dict.fromkeys(answers.ticket.capture for answers in ended):
            mine = [answers for answers in ended if answers.ticket.capture == name]
            with self._guard(name, [key for answers in mine for key in answers.ticket.keys]):
                capture = self._open(name, mine[0].ticket.coverage)
                finished = [sample for answers in mine for sample in self._samples(capture, answers)]
                capture.writer.reserve([sample.key for sample, _ in finished], len(finished))
                self._settle(capture, capture.shelf.place(finished))

    def drop(self, keys: Sequence[str], cause: str) -> None:
        """A request has ended without its answers: forget its rows."""
        self.states.fail(keys, cause)
        with self._guard(None, ()):
            self._workers.drop(keys)

    def work(self) -> bool:
        """Settle what is stored, publish what is due. Returns whether there is more to wait for."""
        for capture in list(self._captures.values()):
            with self._guard(capture.name, ()):
                self._settle(capture, capture.shelf.settle(capture.shelf.engine.stored(wait=False)))
                if capture.added and time.monotonic() - capture.since >= PUBLISH_SECONDS:
                    self._publish(capture)
        return any(capture.added or len(capture.shelf) for capture in self._captures.values())

    def flush(self) -> None:
        """Publish everything that has finished."""
        for capture in list(self._captures.values()):
            with self._guard(capture.name, ()):
                self._publish(capture)

    def stats(self) -> list[dict[str, int]]:
        """What each worker counts: see CaptureExtension.hiddenlake_stats."""
        return self._workers.call("hiddenlake_stats")

    def close(self) -> None:
        """Publish, and leave the captures. A second call does nothing."""
        for name in list(self._captures):
            self._close(name)

    def _samples(self, capture: _Open, answers: Answers) -> list[tuple[Sample, Placed]]:
        """Those of a request that can be stored. They share its row."""
        finished = []
        row = capture.row + answers.ticket.number
        for i, key in enumerate(answers.ticket.keys):
            try:
                finished.append(self._sample(answers.ticket, answers.generation(i), row, i))
            except Exception as error:  # noqa: BLE001 - of one sample, perhaps the judge's
                cause = f"{type(error).__name__}: {error}"
                self.drop([key], cause)
                capture.writer.fail(Failure(key, row, cause, attempts=1))
        return finished

    def _sample(self, ticket: Ticket, generation: Generation, row: int, i: int) -> tuple[Sample, Placed]:
        model = self.offer.model
        text = model.decode(ticket.prompt_ids)
        # answers to one prompt never lie on both sides of a split
        question = Question(row, text, (), group=token_checksum(ticket.prompt_ids))
        prompt = Prompt(generation.key, question, i, text, ticket.prompt_ids)
        answer = generation.text
        if answer is None:
            answer = model.decode_answer(generation.answer_ids)
        judgement = self._judge(text, answer) if self._judge else Judgement(None, None)
        return make_sample(model, ticket.coverage, prompt, generation, answer, judgement)

    def _open(self, name: str, coverage: Coverage) -> _Open:
        capture = self._captures.get(name)
        if capture is None:
            while len(self._captures) >= _OPEN_CAPTURES:
                self._close(min(self._captures.values(), key=lambda capture: capture.used).name)
            path = self.offer.lake / name
            writer = open_writer(
                path,
                identity=self._identity,
                coverage=coverage,
                provenance=self._provenance,
                planned=0,
                buffer_bytes=self.offer.buffer_bytes,
                shard_samples=self.offer.shard_samples,
                shared=True,
            )
            if name not in self._rows:
                place = writer.place
                orders = [order for shard in list_commits(place) for order in read_commit(place, shard).order if order]
                self._rows[name] = max((index for index, _ in orders), default=-1) + 1
            shelf = Shelf(self._workers.port(), writer)
            capture = self._captures[name] = _Open(name, writer, shelf, self._rows[name])
        capture.used = time.monotonic()
        return capture

    def _settle(self, capture: _Open, settled: Sequence[Settled]) -> None:
        for sample, _, cause in settled:
            if cause is not None:
                capture.writer.fail(Failure(sample.key, sample.index, cause, attempts=1))
                self.states.fail([sample.key], cause)
                continue
            if not capture.added:
                capture.since = time.monotonic()
            capture.added.add(sample.key)
        self._note_commits(capture)

    def _note_commits(self, capture: _Open) -> None:
        committed = capture.added & capture.writer.committed
        self.states.commit(list(committed))
        capture.added -= committed

    def _publish(self, capture: _Open) -> None:
        self._settle(capture, capture.shelf.wait())
        capture.writer.flush()
        self._note_commits(capture)

    def _close(self, name: str) -> None:
        with self._guard(name, ()):
            self._publish(self._captures[name])
            self._captures.pop(name).writer.close()

    @contextmanager
    def _guard(self, name: str | None, keys: Sequence[str]) -> Iterator[None]:
        """Whatever goes wrong inside is the cause of these samples' failure, and of all that the capture has open."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - reported as the cause of every sample concerned
            lost = set(keys)
            if capture := self._captures.pop(name, None):
                with suppress(Exception):  # no worker may write into a slot that is given back
                    capture.shelf.engine.stored(wait=True)
                with suppress(Exception):  # it has failed before, and the cause is known
                    capture.writer.close()
                self._note_commits(capture)
                lost |= capture.added | capture.shelf.keys
            self.states.fail(list(lost), f"{type(error).__name__}: {error}")
            if lost:
                with suppress(Exception):  # an engine that is gone has nothing to forget
                    self._workers.drop(list(lost))
