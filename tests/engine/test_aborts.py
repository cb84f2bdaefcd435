"""Requests that end before their time: nothing of them stays, and nothing of the others is lost."""

import pytest

from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .captures import CHUNKED, TOLERANCE, capture_all, recorder_of, running, scheduler_of, store, worst_errors
from .conftest import make_task
from .small_models import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 10


@pytest.fixture(scope="module")
def stop(tiny_model, module_path):
    """A string that ends some answers: the text of an answer's sixth token."""
    job = plan_job(tiny_model, make_task(N), sites=("mlp_out",), dtype="float32", max_new_tokens=24)
    with running(job) as engine:
        capture, _ = capture_all(job, engine, module_path / "x")
    sample = capture.samples().to_pylist()[0]
    return job.request.model.decode(sample["token_ids"][sample["prompt_length"] + 5 :][:1])


def sample_of(request) -> str:
    """vLLM appends eight hex digits to the id that it was given."""
    return request.request_id[:-9].removesuffix(":last")


def test_aborts_at_every_moment(stop, tiny_model, tmp_path):
    job = plan_job(
        tiny_model, make_task(N), sites=("attn_z", "mlp_out", "resid_post"), positions=[*PAPER, "0", "max_all"],
        dtype="float32", max_new_tokens=24, sampling=Sampling(stop=(stop,)), options=CHUNKED,
    )  # fmt: skip
    aborted: dict[str, str] = {}
    answers = {}
    with running(job) as engine:
        books = recorder_of(engine).books
        [before] = engine.stats()

        def abort(moment, key):
            aborted[moment] = key
            held = len(books[key].slots) if key in books else 0
            free = recorder_of(engine).ring.free
            engine.abort([key])
            assert key not in books and recorder_of(engine).ring.free == free + held
            assert key not in [sample_of(request) for request in scheduler_of(engine).requests.values()]

        for prompt in job.prompts:
            engine.submit(prompt)
        abort("waiting", job.prompts[-1].key)
        while len(answers) + len(aborted) < N:
            answers |= {generation.key: generation for generation in engine.step()}
            for request in list(scheduler_of(engine).requests.values()):
                key = sample_of(request)
                if "prefilling" not in aborted and 0 < request.num_computed_tokens < request.num_prompt_tokens:
                    abort("prefilling", key)
                elif "decoding" not in aborted and request.num_output_tokens == 3:
                    abort("decoding", key)
            if "feeding the last token" not in aborted and engine._tails:
                abort("feeding the last token", next(iter(engine._tails)).removesuffix(":last"))
        assert sorted(aborted) == ["decoding", "feeding the last token", "prefilling", "waiting"]
        assert len(set(aborted.values())) == 4 and not answers.keys() & set(aborted.values())
        finished = next(iter(answers))
        del answers[finished]
        abort("finished and not stored", finished)
        capture = store(job, engine, answers, tmp_path / "x")
        [after] = engine.stats()
        assert (after["free"], after["books"]) == (before["free"], 0)
        assert not engine._reserved and not engine._prompts and not engine._tails
        # what was thrown away can be asked for again, under the same key
        whole, _ = capture_all(job, engine, tmp_path / "again")
    assert len(capture) == N - 5
    reference = Reference("llama", tiny_model)
    assert max(worst_errors(capture, reference).values()) <= TOLERANCE
    assert max(worst_errors(whole, reference).values()) <= TOLERANCE
