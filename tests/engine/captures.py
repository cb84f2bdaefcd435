"""Engines in the tests' own process, and every stored cell against a reference."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.capture import Summary, run_job, start_engine
from hiddenlake.cache.engines.vllm import VllmEngine
from hiddenlake.cache.job import Job
from hiddenlake.cache.placing import make_sample
from hiddenlake.cache.positions import POOLS
from hiddenlake.cache.samples import Generation
from hiddenlake.cache.shelf import Shelf
from hiddenlake.cache.store.writer import open_writer

from .conftest import relative_error

# token ids -> {site: (layer, token, width)}, without layer for `embed` and `final_norm`
Reference = Callable[[Sequence[int]], dict[str, np.ndarray]]

# In float32. Twice what rounding was seen to do in any row of any scheduling.
TOLERANCE = 1e-4

# At most 64 tokens a step: prompts of up to 170 tokens come in parts, mixed with decoding.
CHUNKED = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
# 12 blocks of 32 tokens for several prompts at once, which are let in before all of their blocks are free: the youngest
# are thrown out again, in the middle of their prompts or of their answers.
PREEMPTED = CHUNKED | {
    "block_size": 32, "num_gpu_blocks_override": 12, "scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 16,
}  # fmt: skip


@contextmanager
def running(job: Job) -> Iterator[VllmEngine]:
    """vLLM in this process, so that its scheduler and its worker can be reached: a start takes 4 s instead of 25."""
    import vllm.envs

    gc.collect()  # an engine that a test has left, before vLLM freezes what there is
    with pytest.MonkeyPatch.context() as patch, _few_collections():
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # vLLM 0.32 looks into every loaded module at its start, and trips over this one, which n-gram drafting loads
        patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
        engine = start_engine("vllm", job.request, job.prompts[0].token_ids)
    try:
        yield engine
    finally:
        with _few_collections():
            engine.close()
        gc.unfreeze()
        vllm.envs.disable_envs_cache()  # the next engine reads the environment again


@contextmanager
def _few_collections() -> Iterator[None]:
    """vLLM asks for seven from its start to its end, and each looks through all that these tests have imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


def core_of(engine: VllmEngine):
    return engine._engine.engine_core.engine_core


def scheduler_of(engine: VllmEngine):
    return core_of(engine).scheduler


def count_preemptions(engine: VllmEngine) -> list[str]:
    """A list that grows by the request's id whenever vLLM throws a request out of the batch."""
    scheduler, thrown_out = scheduler_of(engine), []
    preempt = scheduler._preempt_request

    def count(request, *args, **kwargs):
        thrown_out.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = count
    return thrown_out


def worker_of(engine: VllmEngine):
    return engine._engine.model_executor.driver_worker.worker


def recorder_of(engine: VllmEngine):
    return worker_of(engine).hiddenlake_recorder


def capture_all(job: Job, engine: VllmEngine, out: Path) -> tuple[hiddenlake.cache.store.reader.Capture, Summary]:
    """Run a job to its end; nothing may fail."""
    summary = run_job(job, out=out, engine=engine)
    assert (summary.committed, summary.failed) == (len(job.prompts), 0), summary.causes
    return hiddenlake.open_capture(out), summary


def generate(engine: VllmEngine, prompts: Sequence) -> dict[str, Generation]:
    """Answers by key, not stored."""
    for prompt in prompts:
        assert engine.has_room(prompt)
        engine.submit(prompt)
    done: dict[str, Generation] = {}
    while len(done) < len(prompts):
        done |= {generation.key: generation for generation in engine.step()}
    return done


def worst_errors(capture, reference: Reference) -> dict[str, float]:
    """Largest relative L2 error of any cell by site. Token by token: an absent cell must be NaN in every site.

    Pooled positions are compared with NumPy's mean and maximum over the reference's rows.
    """
    names = capture.coverage.positions
    samples = capture.samples().to_pylist()
    stored = {site: capture.read(site, dtype="float32") for site in (*capture.coverage.sites, "embed")}
    worst = dict.fromkeys(stored, 0.0)
    for i, sample in enumerate(samples):
        expected = reference(sample["token_ids"])
        for p, (name, token) in enumerate(zip(names, sample["token_index"], strict=True)):
            for site, values in stored.items():
                found = values[..., p, i, :]
                if token == -1:
                    assert np.isnan(found).all(), (site, name)
                    continue
                rows = expected[site][list(capture.coverage.layers)] if expected[site].ndim == 3 else expected[site]
                cell = rows[..., token, :] if token >= 0 else _pool(name, rows, sample, names)
                worst[site] = max(worst[site], float(relative_error(found, cell).max()))
    return worst


def _pool(name: str, rows: np.ndarray, sample: dict, names: Sequence[str]) -> np.ndarray:
    """(layer, width). rows : (layer, token, width). By hand, without the code that resolves positions."""
    how, span = POOLS[name]
    q, n = sample["prompt_length"], sample["total_length"]
    if span == "exact_answer":
        start, last = (sample["token_index"][names.index(f"exact_answer_{edge}")] for edge in ("first", "last"))
        stop = last + 1
    else:
        start, stop = {"prompt": (0, q), "answer": (q, n), "all": (0, n)}[span]
    part = rows[..., start:stop, :]
    return part.mean(-2) if how == "mean" else part.max(-2)


def assert_greedy(capture, reference: Reference, samples: int | None = None) -> None:
    """Each answer token is the reference's most probable one, or as good, and has its log-probability."""
    for sample in capture.samples().to_pylist()[:samples]:
        best, chosen = logprobs_of(sample, reference)
        assert (best - chosen < 1e-3).all()
        np.testing.assert_allclose(sample["logprobs"], chosen, atol=1e-3)


def logprobs_of(sample: dict, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """(answer token,) log-probability of the most probable token, and of the answer's."""
    ids, q = sample["token_ids"], sample["prompt_length"]
    logits = reference(ids)["logits"][q - 1 : -1].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logprobs.max(-1), logprobs[np.arange(len(ids) - q), ids[q:]]


def store(job: Job, engine: VllmEngine, answers: dict[str, Generation], out: Path):
    """Store what `generate` gave, all or some of it, and open the capture."""
    prompts = {prompt.key: prompt for prompt in job.prompts}
    model = job.request.model
    finished = []
    for key, generation in answers.items():
        text = model.decode_answer(generation.answer_ids) if generation.text is None else generation.text
        judgement = job.task.judge(prompts[key].question, text)
        finished.append(make_sample(model, job.coverage, prompts[key], generation, text, judgement))
    with open_writer(
        out,
        identity=job.identity.to_json(),
        coverage=job.coverage,
        provenance=engine.provenance,
        planned=len(job.prompts),
        shared=True,
    ) as writer:
        assert len(writer.reserve(list(answers), len(answers))) == len(answers)
        shelf = Shelf(engine, writer)
        settled = [*shelf.place(finished), *shelf.wait()]
        assert [cause for _, _, cause in settled] == [None] * len(answers)
    return hiddenlake.open_capture(out)
