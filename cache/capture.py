"""Capture: prompts in, committed rows out. The one pipeline, whatever the engine."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiddenlake.cache.engines.base import Engine, Memory, Request
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.estimate import estimate
from hiddenlake.cache.identity import GREEDY, Sampling
from hiddenlake.cache.job import GIB, Job, plan_job
from hiddenlake.cache.run import Run, fail
from hiddenlake.cache.samples import Task
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.writer import open_writer
from hiddenlake.cache.summary import Summary, Watcher

ENGINES = ("vllm", "transformers")


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
            fail(writer, summary, prompt, cause, attempts=0)
        start = time.perf_counter()
        if running is not None:
            if running is not engine:
                running.start(pending[0].token_ids)
            writer.provenance = running.provenance
            start = time.perf_counter()
            run = Run(job, running, writer, summary, watcher)
            try:
                watcher.started()
                run.go(pending)
                writer.flush()
            except KeyboardInterrupt:
                summary.interrupted = True
            finally:
                run.close()
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
