"""One engine for many requests: what each of them stores is what an engine started for it alone would."""

from dataclasses import replace

import numpy as np
import pytest

from hiddenlake.cache.capture import run_job, start_engine
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import Decoding, Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.run import Run
from hiddenlake.cache.samples import Question
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.writer import open_writer
from hiddenlake.cache.summary import Summary, Watcher

from .captures import TOLERANCE
from .conftest import ListTask, make_task
from .small_models import Reference

pytestmark = pytest.mark.slow

N = 6
OPTIONS = {"vllm": {"max_num_batched_tokens": 512, "max_num_seqs": 8}, "transformers": {"batch_size": 4}}


def given_task() -> ListTask:
    texts = [("The capital of France is", " Paris, of course."), ("Two and two are", " four"), ("Once upon a time", "")]
    return ListTask([Question(i, text, (), given=answer) for i, (text, answer) in enumerate(texts)])


# name -> (task, sites, layers, positions, decoding)
REQUESTS = {
    "greedy": (make_task(N), ("mlp_out",), "all", ("last_q", "first_answer", "-1"), {}),
    "fewer": (make_task(N), ("resid_post",), "0,2", ("-3", "mean_answer", "all_generated/2"), {}),
    "sampled": (make_task(N), ("mlp_out",), "1", ("last_q", "-1"), {"sampling": Sampling(temperature=0.9, seed=3, stop=("is",))}),
    "every": (make_task(N), ("mlp_out", "resid_post"), "0,2", ("all",), {"max_new_tokens": 4}),
    "given": (given_task(), ("mlp_out",), "all", ("last_q", "-1", "mean_prompt", "all"), {}),
    "greedy again": (make_task(N), ("mlp_out",), "all", ("last_q", "first_answer", "-1"), {}),
}  # fmt: skip


def job_of(model, name):
    task, sites, layers, positions, how = REQUESTS[name]
    return plan_job(
        model, task, sites=sites, layers=layers, positions=positions, dtype="float32",
        **{"max_new_tokens": 12, **how},
    )  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.vllm), "transformers"])
def engine(request, tiny_model, module_path):
    job = plan_job(tiny_model, make_task(1), sites=("mlp_out", "resid_post"), dtype="float32", max_new_tokens=32)
    widest = replace(
        job.request, positions=(), tokens=None, max_length=250, varying=True, spill=str(module_path),
        ring_bytes=256 << 20, options=OPTIONS[request.param],
    )  # fmt: skip
    running = start_engine(request.param, widest, job.prompts[0].token_ids)
    yield running
    running.close()


@pytest.fixture(scope="module")
def reference(tiny_model):
    return Reference("llama", tiny_model)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_request_is_answered_as_by_an_engine_of_its_own(engine, name, tiny_model, tmp_path, reference):
    job = job_of(tiny_model, name)
    engine.serve(replace(job.request, ring_bytes=engine.request.ring_bytes, options={}, varying=True))
    published = []

    class Heard(Watcher):
        def published(self):
            published.append(len(open_capture(tmp_path / "x")))

    rest = list(job.prompts)

    def source(most):
        taken, rest[:] = rest[:2], rest[2:]
        return taken

    with open_writer(
        tmp_path / "x", identity=job.identity.to_json(), coverage=job.coverage, provenance={}, planned=0,
        shard_samples=16, shared=True,
    ) as writer:  # fmt: skip
        summary = Summary("x", 0, 0)
        run = Run(job, engine, writer, summary, Heard(), publish_seconds=0.0)
        run.follow(source)
        writer.flush()
    assert not summary.causes and sorted(open_capture(tmp_path / "x").keys) == sorted(p.key for p in job.prompts)
    assert published, "nothing was published before its shard was full"
    capture = open_capture(tmp_path / "x")
    rows = capture.samples().to_pylist()
    for site in job.coverage.sites:
        for i, row in enumerate(rows):
            expected = reference(row["token_ids"])[site][list(job.coverage.layers)]
            scale = np.abs(expected).max()
            if job.coverage.tokens is not None:
                found = capture.read_tokens(site, samples=[i])
                wanted = expected[:, found.token_index]
                assert np.abs(found.values - wanted).max() <= TOLERANCE * scale
            for p, position in enumerate(job.coverage.positions):
                token, q = row["token_index"][p], row["prompt_length"]
                cells = capture.read(site, position=position, samples=i)
                if token == -2:
                    span = slice(0, q) if position == "mean_prompt" else slice(q, None)
                    wanted = expected[:, span].mean(axis=1)
                elif token < 0:
                    assert np.isnan(cells).all()
                    continue
                else:
                    wanted = expected[:, token]
                assert np.abs(cells - wanted).max() <= TOLERANCE * scale, (position, token)


def test_an_answer_drawn_with_a_seed_is_that_of_an_engine_of_its_own(engine, tiny_model, tmp_path):
    job = job_of(tiny_model, "sampled")
    engine.serve(replace(job.request, ring_bytes=engine.request.ring_bytes, options={}, varying=True))
    texts = []
    for folder in ("x", "y"):
        with open_writer(
            tmp_path / folder, identity=job.identity.to_json(), coverage=job.coverage, provenance={}, planned=0,
            shard_samples=16, shared=True,
        ) as writer:  # fmt: skip
            prompts = [replace(p, seed=41 + i) for i, p in enumerate(job.prompts)] if folder == "y" else job.prompts
            Run(job, engine, writer, Summary("x", 0, 0), Watcher()).go(prompts)
        texts.append(open_capture(tmp_path / folder).samples()["answer"].to_pylist())
    assert texts[0] != texts[1]


@pytest.mark.parametrize("change", ["sites", "layers", "max_length"])
def test_what_was_not_planned_for_is_refused(engine, change, tiny_model):
    request = job_of(tiny_model, "greedy").request
    more = {"sites": ("attn_out",), "layers": (31,), "max_length": 10_000}
    with pytest.raises(BadInputError, match="was started for"):
        engine.serve(replace(request, **{change: more[change]}))


def test_a_varying_engine_serves_no_run_of_its_own(engine, tiny_model, tmp_path):
    job = job_of(tiny_model, "greedy")
    engine.serve(replace(job.request, decoding=Decoding(7), options={}, varying=True))
    with pytest.raises(BadInputError, match="was started for another request"):
        run_job(job, out=tmp_path / "x", engine=engine)
