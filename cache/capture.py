"""Capture: prompts in, committed rows out. The one pipeline, whatever the engine."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hiddenlake.cache import positions as rules
from hiddenlake.cache.engines.base import Engine, Request
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.estimate import Estimate, estimate
from hiddenlake.cache.job import GIB, Job, plan_job
from hiddenlake.cache.samples import Failure, Generation, Prompt, Sample, Task
from hiddenlake.cache.spans import find_window
from hiddenlake.cache.store.writer import Writer, open_writer
from hiddenlake.cache.worker.plan import Placement

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
    ring_bytes: int = 2 * GIB,
    buffer_bytes: int = 2 * GIB,
    shard_samples: int | None = None,
    options: dict[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Generate an answer to every question of a task and store its activations. Resumes where it stopped.

    model : Hugging Face folder, or hub id.
    out : the capture's folder, made if absent. One of another identity or coverage is refused.
    sites, layers, positions : as `hiddenlake.cache.sites` and `positions` parse them.
    engine : `vllm`, or `transformers`, the slower reference.
    dtype : `bfloat16` or `float32`, computed in and stored; default the checkpoint's own.
    max_new_tokens : longest answer, in tokens.
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
    engine: str = "vllm",
    buffer_bytes: int = 2 * GIB,
    shard_samples: int | None = None,
    watcher: Watcher | None = None,
) -> Summary:
    """Capture what a job has left to do. See `capture`."""
    watcher = watcher or Watcher()
    if engine not in ENGINES:
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
        cost = estimate(job.request, job.coverage, writer.shard_samples, len(pending), out)
        cost.check_disk()
        watcher.planned(cost, summary)
        for prompt in job.too_long:
            cause = f"the prompt has {len(prompt.token_ids)} tokens, the model's context {job.request.model.context}"
            _fail(writer, summary, prompt, cause, attempts=0)
        start = time.perf_counter()
        if pending:
            running = start_engine(engine, job.request, pending[0].token_ids)
            writer.provenance = running.provenance
            start = time.perf_counter()
            try:
                watcher.started()
                _Run(job, running, writer, summary, watcher).go(pending)
                writer.flush()
            except KeyboardInterrupt:
                summary.interrupted = True
            finally:
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
        self.task, self.model, self.positions = job.task, job.request.model, job.request.positions
        self.engine, self.writer, self.summary, self.watcher = engine, writer, summary, watcher
        self.sample_bytes = writer.layout.shard_bytes // writer.shard_samples
        self.in_flight: dict[str, Prompt] = {}
        self.attempts: dict[str, int] = {}

    def go(self, pending: Sequence[Prompt]) -> None:
        waiting: deque[Prompt] = deque()
        blocks = self._reserve(pending)
        while True:
            while self.engine.has_room():
                if not waiting:
                    waiting.extend(next(blocks, ()))
                if not waiting:
                    break
                prompt = waiting.popleft()
                self.in_flight[prompt.key] = prompt
                self.engine.submit(prompt)
            if not self.in_flight:
                return
            finished = self.engine.step()
            # never more than a shard's worth at once: two shards are open at most
            while finished:
                waiting.extend(self._settle(finished[: self.writer.shard_samples]))
                finished = finished[self.writer.shard_samples :]

    def _reserve(self, pending: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts that no other writer works on, a block at a time."""
        iterator = iter(pending)
        while block := list(islice(iterator, _RESERVE)):
            by_key = {prompt.key: prompt for prompt in block}
            mine = self.writer.reserve(list(by_key), len(by_key))
            self.summary.elsewhere += sum(key not in self.writer.committed for key in by_key.keys() - set(mine))
            if mine:
                yield [by_key[key] for key in mine]

    def _settle(self, finished: Sequence[Generation]) -> list[Prompt]:
        """Store finished samples. Returns the prompts to try again."""
        placed = []
        for generation in finished:
            sample = self._sample(self.in_flight[generation.key], generation)
            shard, slot = self.writer.slot()
            placed.append((sample, shard, slot))
        retry = []
        for shard in {id(shard): shard for _, shard, _ in placed}.values():
            mine = [(sample, slot) for sample, s, slot in placed if s is shard]
            causes = self.engine.store(
                shard.handle, [Placement(s.key, s.token_ids, s.token_index, slot) for s, slot in mine]
            )
            for (sample, slot), cause in zip(mine, causes, strict=True):
                prompt = self.in_flight.pop(sample.key)
                if cause is None:
                    self.writer.add(shard, slot, sample)
                    self.summary.committed += 1
                    self.summary.correct += sample.correct
                    self.summary.tokens += sample.total_length - sample.prompt_length
                else:
                    self.writer.release(shard, slot)
                    tried = self.attempts[sample.key] = self.attempts.get(sample.key, 0) + 1
                    if tried < _ATTEMPTS:
                        retry.append(prompt)
                    else:
                        _fail(self.writer, self.summary, prompt, cause, tried)
        self.summary.bytes = self.summary.committed * self.sample_bytes
        self.watcher.progressed(self.summary)
        return retry

    def _sample(self, prompt: Prompt, generation: Generation) -> Sample:
        answer_ids = generation.answer_ids
        question = prompt.question
        answer = self.model.decode_answer(answer_ids)
        judgement = self.task.judge(question, answer)
        q = len(prompt.token_ids)
        n = q + len(answer_ids)
        window = None
        if judgement.exact_answer is not None:
            window = find_window(self.model.decode, answer_ids, judgement.exact_answer)
        index = rules.resolve(self.positions, q, n, None if window is None else (q + window[0], q + window[1]))
        status = "complete"
        if n >= self.model.context and (index == n - 1).any():
            index[index == n - 1] = rules.ABSENT
            status = "the context is full: the last token has no activation"
        return Sample(
            key=prompt.key,
            index=question.index,
            sample_index=prompt.sample_index,
            group=question.group,
            prompt=prompt.text,
            answer=answer,
            answers=question.answers,
            correct=judgement.correct,
            exact_answer=judgement.exact_answer,
            exact_answer_valid=window is not None,
            token_ids=(*prompt.token_ids, *answer_ids),
            logprobs=generation.logprobs,
            prompt_length=q,
            total_length=n,
            finish_reason=generation.finish_reason,
            token_index=tuple(index.tolist()),
            status=status,
        )
