"""A vllm.LLM that its user built: attached, it answers as before, and its answers are captured."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.positions import POOLED, span_of
from hiddenlake.cache.samples import Judgement

from ..prepared import ENVIRONMENT
from .conftest import COUNTRIES, relative_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LAYERS = (3, 17, 29)

CITIES = list(COUNTRIES)[:8]


@contextmanager
def make_llm(*args, **settings) -> Iterator:
    """A vllm.LLM as a user builds one. It is gone afterwards, with its process."""
    from vllm import LLM

    # a batch takes all prompts whole: vLLM's CPU runner cannot rewind a seeded generator behind a part of one
    small = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "gpu_memory_utilization": 0.3}
    llm = LLM(*args, **small, **settings)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def tapped(demo_model_folder):
    taps = hiddenlake.taps(
        demo_model_folder, dtype="float32", sites="mlp_out,resid_post", layers=LAYERS, ring_bytes=64 << 20
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        making = make_llm(**taps, enforce_eager=True)
        llm = making.__enter__()
    yield llm
    making.__exit__(None, None, None)


@pytest.fixture(scope="module")
def eager(demo_model_folder):
    """Built without a thought of capture, with its engine in a process of its own."""
    with make_llm(str(demo_model_folder), dtype="float32", enforce_eager=True) as llm:
        yield llm


def ask(llm) -> list:
    """Greedy, sampled, several answers, stop strings, log-probabilities: one batch."""
    from vllm import SamplingParams

    chats = [[{"role": "user", "content": f"Which country is the city of {city} in?"}] for city in CITIES]
    kinds = (
        SamplingParams(temperature=0, max_tokens=16),
        SamplingParams(temperature=0, max_tokens=16, logprobs=2, stop=["in the"]),
        SamplingParams(temperature=0.8, seed=3, max_tokens=10, n=2),
        SamplingParams(temperature=0, max_tokens=1, logprobs=0),
    )
    return llm.chat(chats, [kinds[i % len(kinds)].clone() for i in range(len(chats))], use_tqdm=False)


def same(before, after) -> None:
    """Tokens, text, reasons to stop, log-probabilities: to the bit, but for rounding by how rows were batched."""
    assert len(before) == len(after)
    for x, y in zip(before, after, strict=True):
        assert (x.prompt, x.prompt_token_ids, x.finished) == (y.prompt, y.prompt_token_ids, y.finished)
        for u, v in zip(x.outputs, y.outputs, strict=True):
            assert (u.index, u.text, list(u.token_ids)) == (v.index, v.text, list(v.token_ids))
            assert (u.finish_reason, u.stop_reason) == (v.finish_reason, v.stop_reason)
            assert (u.logprobs is None) == (v.logprobs is None)
            for step, again in zip(u.logprobs or (), v.logprobs or (), strict=True):
                assert step.keys() == again.keys()
                for token in step:
                    assert step[token].logprob == pytest.approx(again[token].logprob, abs=1e-4)


def judge(prompt: str, answer: str) -> Judgement:
    found = next((country for country in COUNTRIES.values() if country in answer), None)
    return Judgement(found is not None and next(k for k, v in COUNTRIES.items() if v == found) in prompt, found)


@pytest.mark.parametrize("how", ["tapped", "eager"])
def test_answers_stay_what_they_were_and_are_captured(how, request, reference, tmp_path):
    llm = request.getfixturevalue(how)
    before = ask(llm)
    positions = ["last_q", "first_answer", "-1", "exact_answer_last", "mean_answer", "all_generated"]
    sites = {"sites": "mlp_out,resid_post", "layers": LAYERS} if how == "eager" else {}
    with hiddenlake.attach(
        llm, out=tmp_path / "x", positions=positions, judge=judge, rules="countries 1", **sites
    ) as attached:
        after = ask(llm)
        same(before, after)
        keys = [attached.keys(output) for output in after]
        assert all(output.kv_transfer_params is None for output in before)
    assert not attached.failures
    same(before, ask(llm))
    assert all(worker["books"] == 0 for worker in llm.collective_rpc("hiddenlake_stats"))

    capture = hiddenlake.open_capture(tmp_path / "x")
    assert [key for of_one in keys for key in of_one] == capture.keys, "in the order in which they were asked"
    assert {attached.state(key).state for key in capture.keys} == {"committed"}
    rows = {row["key"]: row for row in capture.samples().to_pylist()}
    exact = 0
    for output, of_one in zip(after, keys, strict=True):
        for answer, key in zip(output.outputs, of_one, strict=True):
            row = rows[key]
            q, n = row["prompt_length"], row["total_length"]
            assert row["token_ids"] == [*output.prompt_token_ids, *answer.token_ids] and row["answer"] == answer.text
            assert row["finish_reason"] == answer.finish_reason and row["status"] == "complete"
            exact += row["exact_answer_valid"]
            expected = reference(row["token_ids"])
            for site in ("mlp_out", "resid_post"):
                values = expected[site][list(LAYERS)]
                stored = capture.read(site, samples=key)
                for p, token in enumerate(row["token_index"]):
                    if token == POOLED:
                        span = span_of(positions[p], q, n, None)
                        want = values[:, span.start : span.stop].mean(1)
                    elif token >= 0:
                        want = values[:, token]
                    else:
                        assert np.isnan(stored[:, p]).all()
                        continue
                    assert relative_error(stored[:, p], want).max() <= 1e-4
                tokens = capture.read_tokens(site, samples=key).values
                assert relative_error(tokens, values[:, q:n]).max() <= 1e-4
    assert exact >= 3
    assert capture.identity["judge"] == "countries 1"


def test_a_capture_goes_on_and_refuses_another_coverage(tapped, tmp_path):
    from vllm import SamplingParams

    def generate() -> None:
        tapped.generate(["Lima is in", "Oslo is in"], SamplingParams(max_tokens=4), use_tqdm=False)

    for rows in ([0, 1], [0, 1, 2, 3]):
        with hiddenlake.attach(tapped, out=tmp_path / "x", sites="mlp_out", layers="3", positions="-1"):
            generate()
        capture = hiddenlake.open_capture(tmp_path / "x")
        assert capture.samples()["index"].to_pylist() == rows
    assert len(set(capture.keys)) == 4, "the same prompt is another sample each time"
    with pytest.raises(BadInputError, match=r"coverage positions is \['-1'\], asked for \['last_q'\]"):
        hiddenlake.attach(tapped, out=tmp_path / "x", sites="mlp_out", layers="3", positions="last_q")
    generate()  # and the LLM is free again


def test_what_cannot_be_captured_is_refused(tapped, tmp_path):
    with pytest.raises(BadInputError, match="attn_out is not tapped"):
        hiddenlake.attach(tapped, out=tmp_path / "x", sites="attn_out")
    with pytest.raises(BadInputError, match="nobody judges these answers"):
        hiddenlake.attach(tapped, out=tmp_path / "x", positions="exact_answer_last")
    with pytest.raises(BadInputError, match="a judge and its rules go together"):
        hiddenlake.attach(tapped, out=tmp_path / "x", judge=judge)
    with hiddenlake.attach(tapped, out=tmp_path / "x") as attached:
        with pytest.raises(CaptureError, match="attached already"):
            hiddenlake.attach(tapped, out=tmp_path / "y")
        with pytest.raises(BadInputError, match="not known here"):
            attached.state("0" * 32)
    with pytest.raises(BadInputError, match="names no samples"):
        attached.keys(ask(tapped)[0])


def test_a_judge_that_fails_costs_its_sample_only(tapped, tmp_path):
    def fails(prompt: str, answer: str) -> Judgement:
        if "Lima" in prompt:
            raise RuntimeError("no idea")
        return Judgement(True, None)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hiddenlake.attach(tapped, out=tmp_path / "x", judge=fails, rules="fails 1") as attached:
            outputs = ask(tapped)
    assert all(output.outputs[0].token_ids for output in outputs)
    [lima] = [i for i, city in enumerate(CITIES) if city == "Lima"]
    assert sorted(attached.failures) == sorted(attached.keys(outputs[lima]))
    assert set(attached.failures.values()) == {"RuntimeError: no idea"}
    assert "samples were not stored, the first because: RuntimeError: no idea" in str(caught[-1].message)
    assert len(hiddenlake.open_capture(tmp_path / "x")) == sum(len(output.outputs) for output in outputs) - len(
        attached.failures
    )


def test_aborted_requests_are_forgotten(tapped, tmp_path):
    from vllm import SamplingParams

    with warnings.catch_warnings(action="ignore"), hiddenlake.attach(tapped, out=tmp_path / "x") as attached:
        [first, _] = tapped.enqueue(["Lima is in", "Oslo is in"], SamplingParams(max_tokens=50, ignore_eos=True))
        for _ in range(3):
            tapped.llm_engine.step()
        tapped.llm_engine.abort_request([first], internal=True)
        [output] = tapped.wait_for_completion(use_tqdm=False)
        [key] = attached.keys(output)
    assert attached.state(key).state == "committed"
    assert list(attached.failures.values()) == ["the request was aborted"]
    assert all(worker["books"] == 0 for worker in tapped.collective_rpc("hiddenlake_stats"))


def test_a_compiled_model_without_taps_is_too_late(tiny_model, tmp_path):
    with (
        make_llm(str(tiny_model), dtype="float32", enforce_eager=False) as llm,
        pytest.raises(CaptureError, match="too late for this LLM: its model was compiled"),
    ):
        hiddenlake.attach(llm, out=tmp_path / "x")
    assert not os.path.exists(tmp_path / "x")
