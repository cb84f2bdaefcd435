"""Chunked prefill and forced preemption leave the same rows, each at its own token: generated answers and given text."""

from dataclasses import replace

import numpy as np
import pytest

from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER, POOLS
from hiddenlake.cache.samples import Question

from .captures import (
    CHUNKED,
    PREEMPTED,
    TOLERANCE,
    assert_greedy,
    capture_all,
    logprobs_of,
    recorder_of,
    running,
    worst_errors,
)
from .conftest import COUNTRIES, SITES, ListTask, make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 12
POSITIONS = (*PAPER, "0", "40", "-60", *POOLS)


def make_pairs() -> ListTask:
    """Questions of many lengths with given answers, right, wrong and empty-handed."""
    answers = (
        "It is in {}, which is well known.",
        "I would say {}.",
        "Nobody knows, though some say it was {} all along.",
    )
    questions = [
        replace(question, given=answers[question.index % 3].format(question.answers[0]))
        for question in make_task(N).questions
    ]
    return ListTask(questions, name="pairs")


def make_texts() -> ListTask:
    """Plain texts from 7 to 170 tokens."""
    texts = [f"{city} lies in {country}. " * (1 + 11 * (i % 3)) for i, (city, country) in enumerate(COUNTRIES.items())]
    return ListTask([Question(i, text, (), given="") for i, text in enumerate(texts)], name="texts")


def plan(model, task, options):
    return plan_job(model, task, sites=SITES, positions=POSITIONS, dtype="float32", max_new_tokens=24, options=options)


@pytest.fixture(scope="module", params=[CHUNKED, PREEMPTED], ids=["chunked", "preempted"])
def generated(request, demo_model_folder, module_path):
    """(capture, rows that were computed again) of generated answers."""
    job = plan(demo_model_folder, make_task(N), request.param)
    with running(job) as engine:
        capture, _ = capture_all(job, engine, module_path / f"generated-{request.param_index}")
        [counts] = engine.stats()
        assert (counts["books"], counts["free"]) == (0, len(recorder_of(engine).bits)), "all rows are given back"
    assert (counts["recomputed"] > 0) == (request.param is PREEMPTED)
    return capture, counts["recomputed"]


@pytest.fixture(scope="module")
def given(demo_model_folder, module_path):
    """{kind: (capture, rows that were computed again)} of given text: pairs, and texts that are all prompt."""
    jobs = {task.name: plan(demo_model_folder, task, PREEMPTED) for task in (make_pairs(), make_texts())}
    found, before = {}, 0
    with running(jobs["pairs"]) as engine:
        for name, job in jobs.items():
            capture, _ = capture_all(job, engine, module_path / name)
            [counts] = engine.stats()
            assert (counts["books"], counts["free"]) == (0, len(recorder_of(engine).bits)), "all rows are given back"
            found[name], before = (capture, counts["recomputed"] - before), counts["recomputed"]
            assert found[name][1] > 0
    return found


def check_rows(capture, again, reference):
    worst = worst_errors(capture, reference)
    print(f"\n{again} rows computed again, worst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE


def test_generated_rows_equal_hugging_face(generated, reference):
    check_rows(*generated, reference)
    assert_greedy(generated[0], reference, 3)
    samples = generated[0].samples().to_pylist()
    assert {s["finish_reason"] for s in samples} == {"stop", "length"}
    assert any(s["exact_answer_valid"] for s in samples) and not all(s["exact_answer_valid"] for s in samples)


@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_given_rows_equal_hugging_face(given, kind, reference):
    check_rows(*given[kind], reference)


def test_given_answers_have_the_models_logprobs(given, reference):
    for sample in given["pairs"][0].samples().to_pylist()[:4]:
        np.testing.assert_allclose(sample["logprobs"], logprobs_of(sample, reference)[1], atol=1e-3)


def test_given_text_is_fed_as_it_is(given, demo_model_folder):
    """No token more and none less: no template around a text, no special token before a given answer, no end behind it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder)
    for question, sample in zip(make_texts().questions, given["texts"][0].samples().to_pylist(), strict=True):
        assert sample["token_ids"] == tokenizer(question.question)["input_ids"]
        assert sample["prompt_length"] == sample["total_length"] and sample["answer"] == "" and sample["logprobs"] == []
    for question, sample in zip(make_pairs().questions, given["pairs"][0].samples().to_pylist(), strict=True):
        chat = [{"role": "user", "content": question.question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(sample["token_ids"]) == prompt + question.given
        assert sample["answer"] == question.given and sample["finish_reason"] == "given"
        assert sample["exact_answer_valid"] and sample["exact_answer"] == question.answers[0]
