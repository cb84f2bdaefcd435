"""Prefix caching: a captured request computes all of its tokens, an ordinary one beside it computes none twice."""

import pytest

import hiddenlake
from hiddenlake.cache.capture import run_job
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .captures import TOLERANCE, capture_all, running, worst_errors
from .conftest import make_task, relative_error
from .small_models import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 8
OPTIONS = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def divert(engine, kind: str) -> dict[str, int]:
    """{request id: tokens from the prefix cache} of finished requests whose id starts with `kind`, which nobody else sees."""
    step, cached = engine._engine.step, {}

    def step_and_divert():
        outputs = step()
        cached.update(
            {o.request_id: o.num_cached_tokens for o in outputs if o.finished and o.request_id.startswith(kind)}
        )
        return [output for output in outputs if not output.request_id.startswith(kind)]

    engine._engine.step = step_and_divert
    return cached


def test_captured_requests_skip_the_cache_that_ordinary_ones_use(tiny_model, tmp_path):
    job = plan_job(
        tiny_model, make_task(N), sites=("attn_out", "resid_post"), positions=[*PAPER, "0", "10", "mean_prompt"],
        dtype="float32", max_new_tokens=8, options=OPTIONS,
    )  # fmt: skip
    reference = Reference("llama", tiny_model)
    with running(job) as engine:
        cached = divert(engine, "ordinary")
        for round_ in ("first", "second"):
            for prompt in job.prompts:
                params = engine._sampling.clone()
                params.skip_reading_prefix_cache = False
                engine._engine.add_request(
                    f"ordinary {round_} {prompt.key}", {"prompt_token_ids": list(prompt.token_ids)}, params
                )
            # captured requests beside ordinary ones, with the same prompts
            capture, _ = capture_all(job, engine, tmp_path / round_)
            while engine._engine.has_unfinished_requests():
                engine._engine.step()
            assert max(worst_errors(capture, reference).values()) <= TOLERANCE
        [counts] = engine.stats()
    again = [cached[f"ordinary second {prompt.key}"] for prompt in job.prompts]
    expected = [(len(prompt.token_ids) - 1) // 32 * 32 for prompt in job.prompts]
    assert again == expected and max(expected) >= 128
    assert counts["recomputed"] == counts["books"] == 0


def test_a_captured_request_that_read_the_cache_fails(tiny_model, tmp_path):
    """Should vLLM ever serve one from it: its rows were not computed, and it says so instead of storing others."""
    job = plan_job(tiny_model, make_task(N), sites=("resid_post",), dtype="float32", max_new_tokens=4, options=OPTIONS)
    with running(job) as engine:
        capture_all(job, engine, tmp_path / "before")
        engine._sampling.skip_reading_prefix_cache = False
        with pytest.raises(CaptureError, match="tokens of a captured request came from the prefix cache"):
            run_job(job, out=tmp_path / "x", engine=engine)
    assert len(hiddenlake.open_capture(tmp_path / "x")) == 0


def test_lengths_match_with_prefix_caching(tiny_model, tmp_path):
    """The same prompts again, in an engine that keeps their prefixes (vLLM #44485): every token has its row once more."""
    job = plan_job(
        tiny_model,
        make_task(N),
        sites=("resid_post",),
        positions=["all"],
        dtype="float32",
        max_new_tokens=8,
        options=OPTIONS,
    )
    reference = Reference("llama", tiny_model)
    with running(job) as engine:
        for name in ("first", "second"):
            capture, _ = capture_all(job, engine, tmp_path / name)
            for i, sample in enumerate(capture.samples().to_pylist()):
                found = capture.read_tokens("resid_post", samples=i)
                assert found.token_index.tolist() == list(range(sample["total_length"]))
                expected = reference(sample["token_ids"])["resid_post"]
                assert relative_error(found.values, expected).max() <= TOLERANCE
