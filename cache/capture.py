"""Capture: prompts in, committed rows out. The one pipeline, whatever the engine."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hiddenlake.cache.engines.base import Engine, Memory, Request
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.estimate import Estimate, estimate
from hiddenlake.cache.identity import GREEDY, Sampling
from hiddenlake.cache.job import GIB, Job, plan_job
from hiddenlake.cache.placing import Placed, make_sample
from hiddenlake.cache.samples import Failure, Generation, Prompt, Sample, Task
from hiddenlake.cache.shelf import Settled, Shelf
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.writer import Writer, open_writer

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
    sampling: Sampling = GREEDY,
    samples: int = 1,
    lora: str | None = None,
    ring_bytes: int = 2 * GIB,
    buffer_bytes: int = 2 * GIB,
    shard_samples: int | None = None,
    codec: str | None = None,
    options: dict[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Generate an answer to every question of a task and store its activations. Resumes where it stopped.

    Answers that the task gives are not generated but fed (teacher-forced) in one pass.

    model : Hugging Face folder, or hub id.
    out : the capture's folder, or `s3://bucket/lake/name`; made if absent. One of another identity or coverage is refused.
    sites, layers, positions : as `hiddenlake.cache.sites` and `positions` parse them.
    engine : `vllm`, or `transformers`, the slower reference.
    dtype : `bfloat16`, `float16` or `float32`, computed in and stored; default the checkpoint's own.
    max_new_tokens : longest answer, in tokens.
    sampling : how tokens are chosen; greedy by default.
    samples : answers a prompt, each a sample of its own. More can be added later.
    lora : folder of a LoRA adapter, for vLLM.
    ring_bytes : host memory for rows whose positions are not known yet.
    buffer_bytes : host memory for the two shards that are being filled and written.
    shard_samples : samples a shard, which is what a crash can lose; default from `buffer_bytes`.
    codec : `none`, `zstd` without loss, or `fp8` with one that is measured on every row and kept with the capture.
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
        codec=codec,
    )
    return run_job(job, out=out, engine=engine, buffer_bytes=buffer_bytes, shard_samples=shard_samples, watcher=watcher)


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

    engine : a name, or an engine that `start_engine` made for this request or a like one, which is left running.
    """
    watcher = watcher or Watcher()
    if isinstance(engine, str) and engine not in ENGINES:
        raise BadInputError(f"engine {engine!r} does not exist: expected {' or '.join(ENGINES)}")
    if not isinstance(engine, str):
        engine.request.check_serves(job.request)
    place = open_backend(out)
    planned = len(job.prompts) + len(job.too_long)
    with open_writer(
        place,
        identity=job.identity.to_json(),
        coverage=job.coverage,
        provenance={},
        planned=planned,
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples,
        codec=job.codec,
        shared=True,
    ) as writer:
        pending = [p for p in job.prompts if p.key not in writer.committed]
        summary = Summary(str(place), planned, present=len(job.prompts) - len(pending))
        running: Engine | None = None
        if pending:
            running = make_engine(engine, job.request) if isinstance(engine, str) else engine
        memory = running.memory if running else Memory(0, 0)
        cost = estimate(job.request, memory, writer.layout, pending, place)
        cost.check()
        watcher.planned(cost, summary)
        for prompt in job.too_long:
            cause = f"the prompt has {len(prompt.token_ids)} tokens, the model's context {job.request.model.context}"
            _fail(writer, summary, prompt, cause, attempts=0)
        start = time.perf_counter()
        if running is not None:
            if running is not engine:
                running.start(pending[0].token_ids)
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


def make_engine(name: str, request: Request) -> Engine:
    """An engine that is not started: what it was asked for is checked, and what it will take is known."""
    if name == "transformers":
        from hiddenlake.cache.engines.transformers import TransformersEngine

        return TransformersEngine(request)
    from hiddenlake.cache.engines.vllm import VllmEngine

    return VllmEngine(request)


def start_engine(name: str, request: Request, canary: Sequence[int]) -> Engine:
    """An engine that is running, for several runs: see Engine.start."""
    engine = make_engine(name, request)
    engine.start(canary)
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
        self.shelf = Shelf(engine, writer)
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
            if len(self.in_flight) == len(self.shelf):
                waiting.extend(self._settle(self.shelf.wait()))
                continue
            finished = [self._sample(self.in_flight[generation.key], generation) for generation in self.engine.step()]
            waiting.extend(self._settle(self.shelf.place(finished)))

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

    def _sample(self, prompt: Prompt, generation: Generation) -> tuple[Sample, Placed]:
        answer = self.model.decode_answer(generation.answer_ids) if generation.text is None else generation.text
        judgement = self.job.task.judge(prompt.question, answer)
        return make_sample(self.model, self.job.coverage, prompt, generation, answer, judgement)

    def _settle(self, settled: Sequence[Settled]) -> list[Prompt]:
        """Count what is settled. Returns the prompts to try again."""
        retry = []
        for sample, placed, cause in settled:
            prompt = self.in_flight.pop(sample.key)
            if cause is None:
                self.summary.committed += 1
                self.summary.correct += bool(sample.correct)
                self.summary.tokens += sample.total_length - sample.prompt_length
                self.summary.bytes += self.sample_bytes + len(placed.tokens) * self.writer.layout.token_bytes
                continue
            tried = self.attempts[sample.key] = self.attempts.get(sample.key, 0) + 1
            if tried < _ATTEMPTS:
                retry.append(prompt)
            else:
                _fail(self.writer, self.summary, prompt, cause, tried)
        if settled:
            self.watcher.progressed(self.summary)
        return retry
