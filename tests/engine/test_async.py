"""Asynchronous scheduling: vLLM schedules a step before it has the tokens of the last one."""

from contextlib import nullcontext

import pytest

from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .captures import (
    CHUNKED,
    PREEMPTED,
    TOLERANCE,
    assert_greedy,
    capture_all,
    core_of,
    count_preemptions,
    recorder_of,
    running,
    scheduler_of,
    worst_errors,
)
from .conftest import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 12


class Nothing:
    """A CUDA stream or event where there is no CUDA: the order of the steps is real, their overlap is not."""

    def __init__(self, *args, **kwargs) -> None: ...

    def record(self, *args) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream) -> None: ...


@pytest.fixture(scope="module")
def forced():
    """vLLM turns asynchronous scheduling off on a CPU: turn it on again behind it."""
    import torch
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_turn_on(config):
        check(config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", staticmethod(check_and_turn_on))
        for module, name in (
            (torch, "Event"),
            (torch.cuda, "Event"),
            (torch.cuda, "Stream"),
            (torch.cuda, "current_stream"),
        ):
            patch.setattr(module, name, Nothing)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        yield


@pytest.fixture(scope="module", params=[CHUNKED, PREEMPTED], ids=["chunked", "preempted"])
def run(request, forced, demo_model_folder, module_path):
    """(whether preempted, capture, steps that were scheduled before the last one's tokens were there, preemptions)"""
    job = plan_job(
        demo_model_folder, make_task(N), sites=("mlp_out", "resid_post"), positions=[*PAPER, "max_answer"], dtype="float32",
        max_new_tokens=20, sampling=Sampling(stop=("located", "largest")), options=request.param,
    )  # fmt: skip
    with running(job) as engine:
        scheduler, queue = scheduler_of(engine), core_of(engine).batch_queue
        schedule = scheduler.schedule
        ahead = []

        def count(*args, **kwargs):
            ahead.append(len(queue))
            return schedule(*args, **kwargs)

        scheduler.schedule = count
        thrown_out = count_preemptions(engine)
        capture, _ = capture_all(job, engine, module_path / str(request.param_index))
        [counts] = engine.stats()
    assert (counts["books"], counts["free"]) == (0, len(recorder_of(engine).bits))
    return request.param is PREEMPTED, capture, sum(map(bool, ahead)), len(thrown_out)


def test_steps_ran_ahead(run):
    preempted, _, ahead, thrown_out = run
    print(f"\n{ahead} steps scheduled ahead, {thrown_out} preemptions")
    assert ahead > N
    assert (thrown_out > 0) == preempted


def test_rows_equal_hugging_face(run, reference):
    """The last token's too, however the answer ended."""
    _, capture, _, _ = run
    worst = worst_errors(capture, reference)
    print(f"\nworst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    last = capture.coverage.positions.index("-1")
    samples = capture.samples().to_pylist()
    assert all(s["token_index"][last] == s["total_length"] - 1 and s["status"] == "complete" for s in samples)
    ends = {(s["finish_reason"], s["token_ids"][-1] == 2) for s in samples}
    assert ends == {("stop", True), ("stop", False), ("length", False)}, "end token, stop string and length"


def test_answers_are_the_models_own(run, reference):
    assert_greedy(run[1], reference, 6)
