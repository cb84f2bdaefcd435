"""`hiddenlake up`: a server and a worker by one command, for one machine."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest

from hiddenlake.cache.service import clock

from .conftest import add_key
from .working import OPTIONS, chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def workers(pid):
    """Beside them there is the process that makes token ids."""
    return [child.pid for child in psutil.Process(pid).children() if "worker" in child.cmdline()]


def wait(what, seconds=120):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@contextmanager
def running(lake, model, log):
    with log.open("wb") as out:
        up = subprocess.Popen(
            [sys.executable, "-m", "hiddenlake.cli", "up", str(lake), "--model", str(model), "--port", "0", *OPTIONS],
            stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        yield up
    finally:
        up.kill()
        up.wait()


def test_both_run_and_a_worker_that_dies_is_started_again(tiny_model, tmp_path):
    lake, log = tmp_path / "lake", tmp_path / "log"
    lake.mkdir()
    key = add_key(lake, "tests", "compute")
    with running(lake, tiny_model, log) as up:
        url = wait(lambda: " at http://" in log.read_text() and log.read_text().split(" at ")[1].split()[0])
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
            body = {"inputs": [chat("What is up?")], "generation": {"max_new_tokens": 3}, "wait": 60}

            def answered():
                response = http.post("/v1/activations:resolve", json=body)
                return response.status_code == 200 and response.json()["entries"]

            wait(answered)
            [worker] = workers(up.pid)
            begun = clock.started(worker)
            os.kill(worker, signal.SIGKILL)
            body["inputs"] = [chat("And now?")]
            wait(answered)
            [again] = workers(up.pid)
            assert (again, clock.started(again)) != (worker, begun)
            up.terminate()
            assert up.wait(60) == 0
            assert clock.started(again) is None, "the worker went on alone"


def test_a_worker_does_not_outlive_who_started_it(tiny_model, tmp_path):
    lake, log = tmp_path / "lake", tmp_path / "log"
    lake.mkdir()
    with running(lake, tiny_model, log) as up:
        wait(lambda: "is ready" in log.read_text())
        [worker] = workers(up.pid)
    wait(lambda: clock.started(worker) is None, 30)
