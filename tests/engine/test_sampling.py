"""Sampled answers: each with a seed of its own, the same in every run, whatever the batch looks like."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from hiddenlake.cache.capture import run_job, start_engine
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .captures import TOLERANCE, capture_all, logprobs_of, running, worst_errors
from .conftest import make_task
from .small_models import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N, EACH = 4, 3

ENGINES = {
    "roomy": {},
    # 16 blocks of 32 tokens for 12 sequences of up to 190: growing answers throw others out, which come back later
    "preemption": {"max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 16},
}


def plan(model, seed=1, **options):
    return plan_job(
        model, make_task(N), sites=("mlp_out", "resid_post"), positions=[*PAPER, "mean_all"], dtype="float32",
        max_new_tokens=16, sampling=Sampling(temperature=0.8, top_p=0.95, top_k=200, seed=seed), samples=EACH, options=options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def captures(demo_model_folder, module_path):
    """{name: (capture, rows computed again)}"""
    found = {}
    for name, options in ENGINES.items():
        job = plan(demo_model_folder, **options)
        with running(job) as engine:
            capture, _ = capture_all(job, engine, module_path / name)
            found[name] = capture, engine.stats()[0]["recomputed"]
            # its engine would draw with the seeds of the first
            with pytest.raises(BadInputError, match="started for another request .decoding"):
                run_job(plan(demo_model_folder, seed=2), out=module_path / "other", engine=engine)
    return found


def answers(capture):
    return {sample["key"]: sample["token_ids"][sample["prompt_length"] :] for sample in capture.samples().to_pylist()}


def test_each_sample_has_a_key_and_an_answer_of_its_own(captures):
    samples = captures["roomy"][0].samples().to_pylist()
    assert [(s["index"], s["sample_index"]) for s in samples] == [(i, j) for i in range(N) for j in range(EACH)]
    assert len({s["key"] for s in samples}) == N * EACH
    for i in range(N):
        assert len({tuple(s["token_ids"]) for s in samples if s["index"] == i}) > 1


def test_two_runs_give_the_same_answers(captures):
    """Though the second one had to start some of them again."""
    (roomy, calm), (preempted, again) = captures["roomy"], captures["preemption"]
    assert calm == 0 and again > 0
    assert answers(roomy) == answers(preempted)


@pytest.mark.parametrize("name", ENGINES)
def test_rows_and_logprobs_equal_hugging_face(captures, name, reference):
    """The log-probabilities are the model's own, before temperature and truncation."""
    capture = captures[name][0]
    worst = worst_errors(capture, reference)
    print(f"\n{name}: worst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    for sample in capture.samples().to_pylist()[:4]:
        np.testing.assert_allclose(sample["logprobs"], logprobs_of(sample, reference)[1], atol=1e-3)


@pytest.fixture(scope="module")
def long_model(tiny_model, module_path):
    """The tiny model with a context of 8192 tokens."""
    folder = module_path / "long"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


def test_a_prompt_longer_than_the_usual_batch(long_model, tmp_path):
    """On a CPU, vLLM cannot take a seeded request's prompt in parts, so a batch must hold the longest."""
    task = make_task(2)
    task.questions[1] = replace(task.questions[1], question="word " * 4300)
    job = plan_job(
        long_model, task, sites=("resid_post",), positions=("last_q", "-1"), dtype="float32", max_new_tokens=4,
        sampling=Sampling(temperature=0.8, seed=1),
    )  # fmt: skip
    assert len(job.prompts[1].token_ids) > 4096
    with running(job) as engine:
        capture, _ = capture_all(job, engine, tmp_path / "x")
    assert max(worst_errors(capture, Reference("llama", long_model)).values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_num_batched_tokens": 64}, "max_num_batched_tokens=64 is less than the longest sequence"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill=True"),
    ],
)
def test_prompts_in_parts_refuse(options, sentence, tiny_model):
    job = plan(tiny_model, **options)
    with pytest.raises(CaptureError, match=sentence):
        start_engine("vllm", job.request, job.prompts[0].token_ids)
