"""Tensor and pipeline parallelism: two ranks fill one shard, each with what it has."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from hiddenlake.cache.engines import vllm_setup
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from ..prepared import ENVIRONMENT
from .captures import CHUNKED, TOLERANCE, capture_all, running, worst_errors
from .conftest import make_task
from .small_models import Reference, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Under tensor parallelism the first two are split by columns, the rest is the same on both ranks.
SITES = ("attn_z", "mlp_act", "resid_pre", "attn_out", "mlp_out", "resid_post", "final_norm")

# Taken by the workers instead of ours: one tap of the second rank is forgotten.
FORGETFUL = """
from hiddenlake.cache.worker import taps
from hiddenlake.cache.worker.extension import CaptureExtension

install_hook = taps.install_hook

def forgetful(model, family, site, layer, write):
    from vllm.distributed import get_tensor_model_parallel_rank

    if (get_tensor_model_parallel_rank(), site, layer) != (1, "mlp_act", 1):
        install_hook(model, family, site, layer, write)

taps.install_hook = forgetful

class Extension(CaptureExtension):
    pass
"""


@pytest.fixture(scope="module")
def model(demo_model_folder, module_path):
    folder = module_path / "llama"
    make_model("llama", folder, demo_model_folder)
    return folder


def plan(model, kind):
    return plan_job(
        model, make_task(8), sites=SITES, positions=[*PAPER, "0", "-50", "mean_all", "max_exact_answer"], dtype="float32",
        max_new_tokens=8, options={f"{kind}_parallel_size": 2, **CHUNKED},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_both_ranks_fill_the_shard(kind, model, tmp_path):
    job = plan(model, kind)
    with running(job) as engine:
        free = [counts["free"] for counts in engine.stats()]
        capture, _ = capture_all(job, engine, tmp_path / "x")
        counts = engine.stats()
    reference = Reference("llama", model)
    worst = worst_errors(capture, reference)
    print(f"\n{kind}: worst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    assert {commit.provenance["ranks"] for commit in capture.commits} == {2}
    assert [c["books"] for c in counts] == [0, 0] and [c["free"] for c in counts] == free


def test_a_dead_tap_of_the_second_rank_refuses(model, tmp_path, monkeypatch):
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(vllm_setup.TAP_ARGUMENTS, "worker_extension_cls", "forgetful.Extension")
    refused = r"the canary failed.*1 of 26 taps left no values \(first: mlp_act 1\)"
    with pytest.raises(CaptureError, match=refused), running(plan(model, "tensor")):
        pytest.fail("the engine started")


def test_no_rank_outlives_a_killed_driver(model, tmp_path):
    """Ranks that compute together wait for each other, and nobody tells them that the driver is gone."""
    out = tmp_path / "x"
    command = [
        sys.executable, "-m", "hiddenlake.cli", "capture", "--model", model, "--task", "cities", "--limit", 400, "--out", out,
        "--sites", "resid_post", "--dtype", "float32", "--max-new-tokens", 100, "--shard-samples", 8,
        "--engine-options", '{"tensor_parallel_size": 2, "max_num_seqs": 16}',
    ]  # fmt: skip
    with subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as driver:
        deadline = time.monotonic() + 300
        while not list(out.glob("claims/*")) and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)  # into the answers
        assert driver.poll() is None, driver.stderr.read()
        processes = psutil.Process(driver.pid).children(recursive=True)
        names = " ".join(" ".join(process.cmdline()) for process in processes)
        driver.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()
    assert "EngineCore" in names and "Worker_TP0" in names and "Worker_TP1" in names, driver.stderr
    assert not alive
