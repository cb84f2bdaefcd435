"""A ring that is too small for what is in flight: rows go to a scratch file and come back, or their samples fail."""

import errno
import os

import pytest

import hiddenlake
from hiddenlake.cache.capture import run_job
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER
from hiddenlake.cache.worker.spill import Spill

from .captures import PREEMPTED, TOLERANCE, capture_all, recorder_of, running, worst_errors
from .conftest import make_task
from .small_models import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 24
SITES = ("attn_z", "mlp_act", "resid_post", "final_norm")
FREE = 80  # rows: enough for a step's, and for two samples of 30 or so; 24 samples are in flight


@pytest.fixture(scope="module")
def job(tiny_model):
    return plan_job(
        tiny_model, make_task(N), sites=SITES, positions=[*PAPER, "0", "20", "mean_all"], dtype="float32", max_new_tokens=24,
        options=PREEMPTED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(job):
    """All but a few of the ring's rows belong to somebody else. Its admission counted on them."""
    with running(job) as engine:
        recorder_of(engine).ring.take(engine.stats()[0]["free"] - FREE)
        yield engine


@pytest.fixture(scope="module")
def tiny_reference(tiny_model):
    return Reference("llama", tiny_model)


def test_spilled_rows_come_back(job, engine, tiny_reference, tmp_path, monkeypatch):
    recorder = recorder_of(engine)
    monkeypatch.setattr(recorder, "spill", Spill(str(tmp_path), recorder.bits.shape[1], recorder.bits.dtype))
    capture, _ = capture_all(job, engine, tmp_path / "x")
    [counts] = engine.stats()
    worst = worst_errors(capture, tiny_reference)
    print(f"\n{counts}, worst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    assert counts["spilled"] > 2 * FREE and counts["recomputed"] > 0
    assert (counts["free"], counts["books"], recorder.spill.used) == (FREE, 0, 0)


def test_without_a_scratch_file_samples_fail_and_say_why(job, engine, tiny_reference, tmp_path):
    summary = run_job(job, out=tmp_path / "x", engine=engine)
    assert summary.failed > 0 and summary.committed > 0 and summary.failed + summary.committed == N
    assert {cause.split(":")[0] for cause in summary.causes.values()} == {"the ring was full"}
    capture = hiddenlake.open_capture(tmp_path / "x")
    assert max(worst_errors(capture, tiny_reference).values()) <= TOLERANCE
    [counts] = engine.stats()
    assert (counts["free"], counts["books"]) == (FREE, 0)


def test_a_full_disk_fails_the_samples_and_not_the_engine(job, engine, tiny_reference, tmp_path, monkeypatch):
    recorder = recorder_of(engine)
    monkeypatch.setattr(recorder, "spill", Spill(str(tmp_path), recorder.bits.shape[1], recorder.bits.dtype))
    pwrite, left = os.pwrite, [100]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        summary = run_job(job, out=tmp_path / "x", engine=engine)
    assert summary.failed > 0 and summary.failed + summary.committed == N
    assert all("No space left on device" in cause for cause in summary.causes.values())
    [counts] = engine.stats()
    assert (counts["free"], counts["books"], recorder.spill.used) == (FREE, 0, 0)
    resumed = run_job(job, out=tmp_path / "x", engine=engine)
    assert (resumed.present, resumed.committed, resumed.failed) == (summary.committed, summary.failed, 0)
    assert max(worst_errors(hiddenlake.open_capture(tmp_path / "x"), tiny_reference).values()) <= TOLERANCE
