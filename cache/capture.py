"""Capture: prompts in, committed rows out. The one pipeline, whatever the engine."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hiddenlake.cache.engines.base import Engine, Request
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.estimate import Estimate, estimate
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import GIB, Job, plan_job
from hiddenlake.cache.placing import Placed, make_sample
from hiddenlake.cache.samples import Failure, Generation, Prompt, Sample, Task
from hiddenlake.cache.store.shard import Shard, TokenShard
from hiddenlake.cache.store.spans import TokenPiece, TokenSpan
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.worker.plan import Piece, Placement

# Samples reserved at a time: enough to keep an engine busy, few enough for several writers to share a small task.
_RESERVE = 64

# A generation is cheap beside a lost sample, and a second failure is not chance.
_ATTEMPTS = 2

ENGINES = ("vllm", "transformers")


@dataclass(slots=True)
class Summary:
    """What a run did.

    planned : samples of the task.  present : committed before the run.  committed, failed : by this run.
    elsewhere : reserved by another writer that is still running.
    correct : of the committed.  bytes : written.  causes : why samples failed, by key.
    tokens : generated.  seconds : of generation and capture, engine start not counted.
    """

    path: str
    planned: int
    present: int
    committed: int = 0
    failed: int = 0
    elsewhere: int = 0
    correct: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    causes: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Hears of a run's progress. The default is silent."""

    def planned(self, cost: Estimate, summary: Summary) -> None:
        """Before the engine starts."""

    def started(self) -> None:
        """The engine is up and its canary has passed."""

    def progressed(self, summary: Summary) -> None:
        """Samples have been stored, or have failed."""


def capture(
    model: str,
    task: Task,
    *,
    out: str | Path,
    sites: Sequence[str] = ("mlp_out",),
    layers: str | Sequence[int] = "all",
    positions: str | Sequence[str | int] = "paper",
    engine: str = "vllm",
    dtype: str | None = None,
    max_new_tokens: int = 100,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    lora: str | None = None,
    ring_bytes: int = 2 * GIB,
    buffer_bytes: int = 2 * GIB,
    shard_samples: int | None = None,
    options: dict[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Generate an answer to every question of a task and store its activations. Resumes where it stopped.

    Answers that the task gives are not generated but fed (teacher-forced) in one pass.

    model : Hugging Face folder, or hub id.
    out : the capture's folder, made if absent. One of another identity or coverage is refused.
    sites, layers, positions : as `hiddenlake.cache.sites` and `positions` parse them.
    engine : `vllm`, or `transformers`, the slower reference.
    dtype : `bfloat16` or `float32`, computed in and stored; default the checkpoint's own.
    max_new_tokens : longest answer, in tokens.
    sampling : how tokens are chosen; greedy by default.
    samples : answers a prompt, each a sample of its own. More can be added later.
    lora : folder of a LoRA adapter, for vLLM.
    ring_bytes : host memory for rows whose positions are not known yet.
    buffer_bytes : host memory for the two shards that are being filled and written.
    shard_samples : samples a shard, which is what a crash can lose; default from `buffer_bytes`.
    options : the engine's own settings, e.g. {"gpu_memory_utilization": 0.8}.

    A sample that cannot be captured is tried twice, then recorded with its cause; the rest go on. Ctrl-C and
    errors publish what is complete before they are passed on.

    Raises HiddenlakeError: bad input, another identity, a canary that failed, a disk that is full.
    """
    job = plan_job(
        model,
        task,
        sites=sites,
        layers=layers,
        positions=positions,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        samples=samples,
        lora=lora,
        ring_bytes=ring_bytes,
        options=options,
    )
    return run_job(
        job, out=out, engine=engine, buffer_bytes=buffer_bytes, shard_samples=shard_samples, watcher=watcher
    )


def run_job(
    job: Job,
    *,
    out: str | Path,
    engine: str | Engine = "vllm",
    buffer_bytes: int = 2 * GIB,
    shard_samples: int | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Capture what a job has left to do. See `capture`.

    engine : a name, or an engine that `start_engine` made for this job's request, which is left running.
    """
    watcher = watcher or Watcher()
    if isinstance(engine, str) and engine not in ENGINES:
        raise BadInputError(f"engine {engine!r} does not exist: expected {' or '.join(ENGINES)}")
    out = Path(out)
    planned = len(job.prompts) + len(job.too_long)
    with open_writer(
        out,
        identity=job.identity.to_json(),
        coverage=job.coverage,
        provenance={},
        planned=planned,
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples,
    ) as writer:
        pending = [p for p in job.prompts if p.key not in writer.committed]
        summary = Summary(str(out), planned, present=len(job.prompts) - len(pending))
        cost = estimate(job.request, writer.layout, pending, out)
        cost.check_disk()
        watcher.planned(cost, summary)
        for prompt in job.too_long:
            cause = f"the prompt has {len(prompt.token_ids)} tokens, the model's context {job.request.model.context}"
            _fail(writer, summary, prompt, cause, attempts=0)
        start = time.perf_counter()
        if pending:
            running = start_engine(engine, job.request, pending[0].token_ids) if isinstance(engine, str) else engine
            writer.provenance = running.provenance
            start = time.perf_counter()
            try:
                watcher.started()
                _Run(job, running, writer, summary, watcher).go(pending)
                writer.flush()
            except KeyboardInterrupt:
                summary.interrupted = True
            finally:
                if running is not engine:
                    running.close()
    # the writer has published what was complete, interrupted or not
    summary.committed, summary.bytes = writer.published, writer.bytes_written
    summary.seconds = time.perf_counter() - start
    return summary


def start_engine(name: str, request: Request, canary: Sequence[int]) -> Engine:
    """Load the model with its taps. vLLM must pass its canary, a prompt's ids, before it may capture."""
    if name == "transformers":
        from hiddenlake.cache.engines.transformers import TransformersEngine

        return TransformersEngine(request)
    from hiddenlake.cache.engines.vllm import VllmEngine

    engine = VllmEngine(request)
    try:
        engine.check_canary(canary)
    except BaseException:
        engine.close()
        raise
    return engine


def _fail(writer: Writer, summary: Summary, prompt: Prompt, cause: str, attempts: int) -> None:
    writer.fail(Failure(prompt.key, prompt.question.index, cause, attempts))
    summary.failed += 1
    summary.causes[prompt.key] = cause


class _Run:
    """One engine and one writer at work on one task."""

    def __init__(self, job: Job, engine: Engine, writer: Writer, summary: Summary, watcher: Watcher) -> None:
        self.job, self.model = job, job.request.model
        self.engine, self.writer, self.summary, self.watcher = engine, writer, summary, watcher
        self.sample_bytes = writer.layout.shard_bytes // writer.shard_samples
        self.in_flight: dict[str, Prompt] = {}
        self.storing: dict[str, _Storing] = {}
        self.attempts: dict[str, int] = {}

    def go(self, pending: Sequence[Prompt]) -> None:
        waiting: deque[Prompt] = deque()
        blocks = self._reserve(pending)
        while True:
            while waiting or waiting.extend(next(blocks, ())) or waiting:
                if not self.engine.has_room(waiting[0]):
                    break
                self._submit(waiting.popleft())
            if not self.in_flight:
                return
            if len(self.in_flight) == len(self.storing):
                waiting.extend(self._settle(self.engine.stored(wait=True)))
                continue
            finished = self.engine.step()
            # never more than a shard's worth at once: two shards are open at most
            while finished:
                block, finished = finished[: self.writer.shard_samples], finished[self.writer.shard_samples :]
                if len(self.storing) + len(block) > self.writer.shard_samples:
                    waiting.extend(self._settle(self.engine.stored(wait=True)))
                waiting.extend(self._place(block))

    def _reserve(self, pending: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts that no other writer works on, a block at a time."""
        iterator = iter(pending)
        while block := list(islice(iterator, _RESERVE)):
            by_key = {prompt.key: prompt for prompt in block}
            mine = self.writer.reserve(list(by_key), len(by_key))
            self.summary.elsewhere += sum(key not in self.writer.committed for key in by_key.keys() - set(mine))
            if mine:
                yield [by_key[key] for key in mine]

    def _submit(self, prompt: Prompt) -> None:
        self.in_flight[prompt.key] = prompt
        tokens = None
        if prompt.given is not None:
            # all is known of given text, so only what will be stored is kept
            nothing = (0.0,) * len(prompt.given)
            _, placed = self._sample(prompt, Generation(prompt.key, prompt.given, nothing, "given"))
            tokens = placed.tokens_needed()
        self.engine.submit(prompt, tokens)

    def _place(self, finished: Sequence[Generation]) -> list[Prompt]:
        """Give finished samples their places and start to store them. Returns the prompts to try again."""
        retry: list[Prompt] = []
        batch = _Batch()
        for generation in finished:
            sample, placed = self._sample(self.in_flight[generation.key], generation)
            shard, slot = self.writer.slot()
            span = self.writer.span(len(placed.tokens)) if self.job.coverage.tokens else None
            item = self.storing[sample.key] = _Storing(sample, placed, shard, slot, span)
            batch.add(item, self._pieces(item), cells=True)
            while not item.done:
                # no buffer is left for the rest of this sample's tokens: fill those that are held first
                retry += self._settle([*self.engine.store(batch.handles, batch.placements), *self.engine.stored(wait=True)])
                batch = _Batch()
                if sample.key not in self.storing:
                    break
                batch.add(item, self._pieces(item), cells=False)
        return retry + self._settle(self.engine.store(batch.handles, batch.placements))

    def _pieces(self, item: "_Storing") -> list[TokenPiece]:
        """Places for the sample's next tokens, as many as the token buffers take."""
        pieces = []
        while item.span is not None and item.span.rest and (piece := self.writer.piece(item.span)) is not None:
            pieces.append(piece)
        return pieces

    def _sample(self, prompt: Prompt, generation: Generation) -> tuple[Sample, Placed]:
        answer = self.model.decode_answer(generation.answer_ids) if generation.text is None else generation.text
        judgement = self.job.task.judge(prompt.question, answer)
        return make_sample(self.model, self.job.coverage, prompt, generation, answer, judgement)

    def _settle(self, stored: Sequence[tuple[str, str | None]]) -> list[Prompt]:
        """Add what has been stored. Returns the prompts to try again."""
        retry = []
        for key, cause in stored:
            item = self.storing[key]
            if cause is None:
                try:
                    self._accept(item)
                except CaptureError as error:  # memory that changed between the worker's check and this one
                    cause = str(error)
            if cause is None and not item.done:
                continue
            del self.storing[key]
            prompt = self.in_flight.pop(key)
            if cause is None:
                self.summary.committed += 1
                self.summary.correct += bool(item.sample.correct)
                self.summary.tokens += item.sample.total_length - item.sample.prompt_length
                self.summary.bytes += self.sample_bytes + len(item.placed.tokens) * self.writer.layout.token_bytes
                continue
            self.writer.release(item.shard, item.slot, item.span)
            tried = self.attempts[key] = self.attempts.get(key, 0) + 1
            if tried < _ATTEMPTS:
                retry.append(prompt)
            else:
                _fail(self.writer, self.summary, prompt, cause, tried)
        if stored:
            self.watcher.progressed(self.summary)
        return retry

    def _accept(self, item: "_Storing") -> None:
        """What was placed is there. Raises CaptureError where it is not."""
        for piece in item.pieces:
            self.writer.filled(piece)
        item.pieces = []
        if item.done:
            self.writer.add(item.shard, item.slot, item.sample, item.span)


@dataclass(slots=True)
class _Storing:
    """A sample on its way into its shards. pieces : places of tokens that were sent and not yet confirmed."""

    sample: Sample
    placed: Placed
    shard: Shard
    slot: int
    span: TokenSpan | None
    pieces: list[TokenPiece] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all of its tokens have a place."""
        return self.span is None or not self.span.rest


class _Batch:
    """Placements of one call to the engine, and the handles of the shards that they name."""

    def __init__(self) -> None:
        self.handles: list[dict[str, Any]] = []
        self.placements: list[Placement] = []
        self._number: dict[int, int] = {}

    def add(self, item: _Storing, pieces: Sequence[TokenPiece], cells: bool) -> None:
        """Place a sample's cells, if asked for, and the pieces of its tokens."""
        item.pieces = [*pieces]
        tokens = item.placed.tokens
        placed = []
        for piece in pieces:
            part = tokens[piece.first : piece.first + piece.count]
            placed.append(Piece(self._handle(piece.shard), piece.row, (part.start, part.stop, part.step)))
        cells = cells and bool(item.sample.token_index)
        handle = self._handle(item.shard) if cells else None
        self.placements.append(item.placed.placement(item.sample, handle, item.slot, placed, item.done))

    def _handle(self, shard: Shard | TokenShard) -> int:
        if id(shard) not in self._number:
            self._number[id(shard)] = len(self.handles)
            self.handles.append(shard.handle)
        return self._number[id(shard)]
