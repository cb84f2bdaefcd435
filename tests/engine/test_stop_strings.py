"""Stop strings: the answer is cut as vLLM cuts it, and the last token, which vLLM never fed, has its row."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .captures import TOLERANCE, assert_greedy, capture_all, recorder_of, running, worst_errors
from .conftest import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N, NEW = 10, 20
SETTINGS = {
    "sites": ("mlp_out", "resid_post"),
    "positions": [*PAPER, "mean_answer"],
    "dtype": "float32",
    "max_new_tokens": NEW,
}


@pytest.fixture(scope="module")
def plain(demo_model_folder, module_path):
    """The samples without stop strings."""
    job = plan_job(demo_model_folder, make_task(N), **SETTINGS)
    with running(job) as engine:
        return capture_all(job, engine, module_path / "plain")[0].samples().to_pylist()


@pytest.fixture(scope="module")
def stops(plain, demo_tokenizer):
    """{kind: stop string}, taken from what the model says."""

    def words(sample):
        return [demo_tokenizer.decode(token) for token in sample["token_ids"][sample["prompt_length"] :]]

    long = next(w for w in words(plain[0])[3:] if len(w.strip()) >= 5 and w.strip().isalpha())
    pair = words(plain[1])[4:6]
    return {"inside": long[1:-1], "spans": pair[0][-2:] + pair[1][:2], "never": "\x01never\x01"}


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model_folder):
    return AutoTokenizer.from_pretrained(demo_model_folder)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix_cache", "no_prefix_cache"])
def run(request, stops, demo_model_folder, module_path):
    """(capture, what vLLM gives for ordinary requests with the same stop strings)."""
    # blocks of 32, the smallest on a CPU, so that a tail finds some of its sequence in the cache
    options = {"enable_prefix_caching": request.param, "max_num_batched_tokens": 64, "block_size": 32}
    sampling = Sampling(stop=tuple(stops.values()))
    job = plan_job(demo_model_folder, make_task(N), **SETTINGS, sampling=sampling, options=options)
    with running(job) as engine:
        capture, _ = capture_all(job, engine, module_path / str(request.param_index))
        [after] = engine.stats()
        assert (after["books"], after["free"]) == (0, len(recorder_of(engine).bits))
        ordinary = {}
        for prompt in job.prompts:
            params = engine._sampling.clone()
            params.skip_reading_prefix_cache = False
            engine._engine.add_request(prompt.key, {"prompt_token_ids": list(prompt.token_ids)}, params)
        while len(ordinary) < N:
            ordinary |= {output.request_id: output for output in engine._engine.step() if output.finished}
    return capture, ordinary


def test_texts_are_cut_as_vllm_cuts_them(run):
    capture, ordinary = run
    for sample in capture.samples().to_pylist():
        [expected] = ordinary[sample["key"]].outputs
        assert sample["answer"] == expected.text
        assert sample["finish_reason"] == expected.finish_reason
        assert sample["token_ids"][sample["prompt_length"] :] == list(expected.token_ids)


def test_each_answer_ends_where_its_stop_string_is_complete(run, plain, stops, demo_tokenizer):
    kinds = set()
    for sample, whole in zip(run[0].samples().to_pylist(), plain, strict=True):
        q = whole["prompt_length"]
        answer = whole["token_ids"][q:]
        texts = [demo_tokenizer.decode(answer[: k + 1], skip_special_tokens=True) for k in range(len(answer))]
        found = [(k, kind) for k, text in enumerate(texts) for kind, stop in stops.items() if stop in text]
        if not found:
            kinds.add("never")
            assert sample["token_ids"] == whole["token_ids"] and sample["answer"] == whole["answer"]
            continue
        k, kind = found[0]
        assert sample["token_ids"] == whole["token_ids"][: q + k + 1]
        assert sample["answer"] == texts[k][: texts[k].index(stops[kind])]
        if not texts[k].endswith(stops[kind]):
            kinds.add("inside")
        if stops[kind] not in demo_tokenizer.decode(answer[k]):
            kinds.add("spans")
    assert kinds == {"inside", "spans", "never"}


def test_rows_equal_hugging_face(run, reference):
    """The last token's too: a request of its own feeds it."""
    capture, _ = run
    worst = worst_errors(capture, reference)
    print(f"\nworst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    last = capture.coverage.positions.index("-1")
    for sample in capture.samples().to_pylist():
        assert sample["token_index"][last] == sample["total_length"] - 1
        assert sample["status"] == "complete"
    assert_greedy(capture, reference, 4)


def test_a_stop_string_at_the_end_of_the_context(tiny_model, tmp_path):
    """No position is left to feed the last token at: its cells are absent, with the cause."""
    task = make_task(1)
    settings = {"sites": ["resid_post"], "positions": ["-1", "-2"], "dtype": "float32"}
    length = len(plan_job(tiny_model, task, **settings).prompts[0].token_ids)
    task.questions[0] = replace(task.questions[0], question=task.questions[0].question + " and" * (250 - length))
    job = plan_job(tiny_model, task, **settings)
    with running(job) as engine:
        [whole] = capture_all(job, engine, tmp_path / "plain")[0].samples().to_pylist()
    assert whole["total_length"] == 256
    answer = whole["answer"]
    last = next(answer[-k:] for k in range(1, len(answer)) if answer.index(answer[-k:]) == len(answer) - k)
    job = plan_job(tiny_model, task, **settings, sampling=Sampling(stop=(last,)))
    with running(job) as engine:
        [sample] = capture_all(job, engine, tmp_path / "stop")[0].samples().to_pylist()
    assert sample["token_ids"] == whole["token_ids"] and sample["answer"] == answer.removesuffix(last)
    assert sample["token_index"] == [-1, 254] and "the context is full" in sample["status"]
