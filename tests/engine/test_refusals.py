"""Taps that cannot fire, or that fire for another row, make a run refuse: nothing is stored."""

from dataclasses import replace

import pytest

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.job import plan_job

from .captures import capture_all, running
from .conftest import ListTask, make_task
from .scripts import run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Each sabotage runs in a process of its own, with the engine in that process, so that it can be reached.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

SCRIPT = """
import sys
import hiddenlake
from hiddenlake.cache.errors import HiddenlakeError
sys.path.insert(0, ".")
from conftest import make_task
model, out, options, sabotage = sys.argv[1:5]
exec(sabotage)
try:
    hiddenlake.capture(model, make_task(4), out=out, sites=["mlp_out"], dtype="float32", max_new_tokens=4,
                       positions=sys.argv[5].split(",") if sys.argv[5:] else ["-1", "last_q"], options=eval(options))
except HiddenlakeError as error:
    print("REFUSED", error)
print("SAMPLES", len(hiddenlake.open_capture(out)))
"""

SABOTAGES = {
    "patched_out_tap": (
        "from hiddenlake.cache.worker import taps; taps._writer = lambda *a: lambda hidden, residual: None",
        "5 of 5 taps left no values",
    ),
    "one_dead_tap": (
        "from hiddenlake.cache.worker import taps; i = taps.install_hook\n"
        "taps.install_hook = lambda m, f, site, *a: None if site == 'mlp_out' else i(m, f, site, *a)",
        "3 of 5 taps left no values (first: mlp_out 0)",
    ),
    "no_taps_at_load": (
        "from hiddenlake.cache.worker import plugin; plugin.register = lambda: None",
        "no taps were installed when the model was loaded",
    ),
    "rows_off_by_one": (
        "from hiddenlake.cache.worker import rows_v1 as r; m = r.batch_rows\n"
        "r.batch_rows = lambda *a: ((i, row, start + 1, n) for i, row, start, n in m(*a))",
        "the log-probability",
    ),
    "residual_forgotten": (
        "from hiddenlake.cache.worker import taps; i = taps.install_hook\n"
        "taps.install_hook = lambda m, f, s, l, w: i(m, f, s, l, lambda hidden, residual: w(hidden, None))",
        "the log-probability",
    ),
    "last_token_not_fed": (
        "from hiddenlake.cache.worker import scheduler as s; s._LastTokenMixin._wants_last_token = lambda *a: False",
        "the last token was not fed",
    ),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotaged_taps_refuse(name, tiny_model, tmp_path):
    sabotage, sentence = SABOTAGES[name]
    done = run_script(tmp_path, SCRIPT, tiny_model, tmp_path / "x", "{}", sabotage, **IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert "REFUSED the canary failed, so nothing is captured" in done.stdout
    assert sentence in done.stdout
    assert "SAMPLES 0" in done.stdout


def test_the_same_script_captures_without_sabotage(tiny_model, tmp_path):
    """Or the tests above would prove nothing."""
    done = run_script(tmp_path, SCRIPT, tiny_model, tmp_path / "x", "{}", "pass", **IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert "REFUSED" not in done.stdout and "SAMPLES 4" in done.stdout


@pytest.mark.parametrize("positions", ["last_q", "first_answer", "0"])
def test_the_canary_does_not_depend_on_the_positions(positions, tiny_model, tmp_path):
    """It needs the last prompt token and the last token, also where the plan wants neither."""
    done = run_script(tmp_path, SCRIPT, tiny_model, tmp_path / "x", "{}", "pass", positions, **IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert "REFUSED" not in done.stdout and "SAMPLES 4" in done.stdout


@pytest.mark.parametrize("kind", ["a text", "a word", "one answer token", "a full context"])
def test_the_canary_fits_where_the_longest_sequence_does(kind, tiny_model, tmp_path):
    """Though it is made from the longest prompt, and generates."""
    [question] = make_task(1).questions
    text, given = {"a text": (question.question, ""), "a word": ("is", "")}.get(kind, (question.question, None))
    if kind == "a full context":
        text = "word " * 224
    task = ListTask([replace(question, question=text, given=given)])
    job = plan_job(
        tiny_model, task, sites=["mlp_out"], positions=["last_q"], dtype="float32",
        max_new_tokens=1 if kind == "one answer token" else 4,
    )  # fmt: skip
    length = len(job.prompts[0].token_ids)
    assert {"a word": length == 1, "a full context": length == 255}.get(kind, 1 < length < 100)
    with running(job) as engine:
        capture_all(job, engine, tmp_path / "x")


def test_taps_installed_after_compile_refuse(tiny_model, tmp_path):
    """A compiled graph that was traced without taps never calls them, and raises nothing."""
    sabotage = """
from hiddenlake.cache.worker import plugin
plugin.register = lambda: None
from hiddenlake.cache.engines.vllm import VllmEngine
check = VllmEngine._check_canary
def install_late(self, ids):
    from hiddenlake.cache.worker.install import install_recorder
    worker = self._engine.model_executor.driver_worker.worker
    install_recorder(worker, self._engine.vllm_config.additional_config["hiddenlake"])
    check(self, ids)
VllmEngine._check_canary = install_late
"""
    done = run_script(tmp_path, SCRIPT, tiny_model, tmp_path / "x", "{'enforce_eager': False}", sabotage, **IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 taps left no values" in done.stdout, done.stdout
    assert "SAMPLES 0" in done.stdout


def test_compiled_model_captures(tiny_model, tmp_path):
    """Taps that are there before it is compiled survive it."""
    done = run_script(tmp_path, SCRIPT, tiny_model, tmp_path / "x", "{'enforce_eager': False}", "pass", **IN_PROCESS)
    assert done.returncode == 0, done.stderr
    assert "REFUSED" not in done.stdout and "SAMPLES 4" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"data_parallel_size": 2}, CaptureError, "data_parallel_size=2 was not tested"),
        ({"speculative_config": {"method": "eagle"}}, CaptureError, "speculative decoding by eagle was not tested"),
        ({"enable_lora": True}, BadInputError, "enable_lora is set by hiddenlake"),
        ({"max_model_len": 64}, BadInputError, "max_model_len is set by hiddenlake"),
        ({"gpu_memory": 1}, BadInputError, "vLLM has no engine argument gpu_memory"),
    ],
)
def test_untested_engine_arguments_refuse(options, error, sentence, tiny_model):
    job = plan_job(tiny_model, make_task(2), max_new_tokens=4, options=options)
    with pytest.raises(error, match=sentence):
        start_engine("vllm", job.request, job.prompts[0].token_ids)


def test_untested_vllm_version_refuses(tiny_model, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.1")
    job = plan_job(tiny_model, make_task(2), max_new_tokens=4)
    with pytest.raises(CaptureError, match="vLLM 0.1 was not tested: install 0.32.0"):
        start_engine("vllm", job.request, job.prompts[0].token_ids)
