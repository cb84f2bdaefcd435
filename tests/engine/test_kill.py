"""kill -9 at random moments of a capture, then resume: nothing committed changes, nothing half-written shows."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import hiddenlake
from hiddenlake.cache.store.verify import verify

from .. import prepared
from .conftest import relative_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KILLS = {"transformers": 15, "vllm": 5}
SAMPLES = 120
OPTIONS = {"transformers": '{"batch_size": 8}', "vllm": '{"max_num_seqs": 16}'}


def start(engine: str, model: Path, out: Path) -> prepared.Process:
    """The capture command."""
    return prepared.start(
        out.parent, "capture", "--model", model, "--task", "cities", "--limit", SAMPLES,
        "--sites", "mlp_out,resid_post", "--layers", "0,9,19,29", "--dtype", "float32", "--max-new-tokens", 12,
        "--shard-samples", 8, "--engine", engine, "--engine-options", OPTIONS[engine], "--out", out,
    )  # fmt: skip


def finish(process: prepared.Process) -> None:
    assert process.wait(600) == 0, process.err


def kill_at_random(process: prepared.Process, out: Path, chance: random.Random) -> None:
    """SIGKILL the driver: during start-up one time in four, else within 3 s of its first claim."""
    claims = out / "claims"
    before = set(claims.glob("*")) if claims.exists() else set()
    stamps = {path: path.stat().st_mtime_ns for path in before}
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 4))
    else:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            now = set(claims.glob("*")) if claims.exists() else set()
            if now - before or any(path.stat().st_mtime_ns != stamps[path] for path in now & before):
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 3))
    assert process.poll() is None, f"the capture ended before it was killed: {process.err}"
    process.kill()
    process.wait(60)


def engines_end(group: int) -> bool:
    """Whether the killed driver's own children end by themselves. They are killed in any case."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not living(group):
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


def living(group: int) -> list[psutil.Process]:
    """Processes of a group that are not zombies waiting for a parent to take note."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def committed_rows(out: Path) -> dict[str, bytes]:
    """key -> every stored byte of the sample, read through the checks."""
    if not (out / "zarr.json").exists():
        return {}
    capture = hiddenlake.open_capture(out)
    if not len(capture):
        return {}
    rows = {site: np.moveaxis(capture.read(site), -2, 0) for site in ("mlp_out", "resid_post", "embed")}
    samples = {sample["key"]: repr(sample).encode() for sample in capture.samples().to_pylist()}
    for sample in capture.samples().to_pylist():
        assert sample["status"] == "complete"
    return {
        key: samples[key] + b"".join(np.ascontiguousarray(rows[site][i]).tobytes() for site in rows)
        for i, key in enumerate(capture.keys)
    }


@pytest.mark.parametrize("engine", KILLS)
def test_kill_and_resume(engine, demo_model_folder, tmp_path, reference):
    chance = random.Random(20)
    out = tmp_path / "killed"
    known: dict[str, bytes] = {}
    progress = []
    for _ in range(KILLS[engine]):
        process = start(engine, demo_model_folder, out)
        kill_at_random(process, out, chance)
        assert engines_end(process.pid), "vLLM's processes outlived their driver"
        found = committed_rows(out)
        assert known.items() <= found.items(), "a committed sample changed or vanished"
        known = found
        progress.append(len(known))
    print(f"\n{engine}: samples committed at each kill {progress}")
    assert 0 < len(known) < SAMPLES, "the kills must fall into the capture"
    finish(start(engine, demo_model_folder, out))
    assert known.items() <= committed_rows(out).items()
    report = verify(out)
    assert report.ok, report.to_json()

    finish(start(engine, demo_model_folder, tmp_path / "whole"))
    compare(hiddenlake.open_capture(out), hiddenlake.open_capture(tmp_path / "whole"), reference)


def compare(killed, whole, reference) -> None:
    """Same keys, same answers, numbers within 1e-4. An answer may differ only at a near-tie, which is printed."""
    assert killed.keys == whole.keys and len(killed) == SAMPLES
    same = []
    for a, b in zip(killed.samples().to_pylist(), whole.samples().to_pylist(), strict=True):
        if a["token_ids"] == b["token_ids"]:
            assert a["answer"] == b["answer"] and a["token_index"] == b["token_index"]
            same.append(a["key"])
            continue
        at = next(i for i, (x, y) in enumerate(zip(a["token_ids"], b["token_ids"], strict=False)) if x != y)
        top = np.sort(reference(a["token_ids"][:at])["logits"][-1])
        print(f"near-tie: {a['answer']!r} or {b['answer']!r}, top-2 logit gap {top[-1] - top[-2]:.2e}")
        assert top[-1] - top[-2] < 1e-3
    worst = 0.0
    for site in ("mlp_out", "resid_post", "embed"):
        found, expected = killed.read(site, samples=same), whole.read(site, samples=same)
        present = ~np.isnan(expected).any(-1)
        assert np.array_equal(present, ~np.isnan(found).any(-1))
        worst = max(worst, float(relative_error(found[present], expected[present]).max()))
    print(f"{len(same)} of {SAMPLES} answers equal, worst relative L2 error {worst:.2e}")
    assert worst <= 1e-4


def test_an_engine_that_dies_is_reported_and_loses_nothing(demo_model_folder, tmp_path):
    """The driver lives: it publishes what is complete, says what happened, and exits with an error."""
    out = tmp_path / "x"
    process = start("vllm", demo_model_folder, out)
    deadline = time.monotonic() + 300
    while not list((out / "commits").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    [engine] = [child for child in psutil.Process(process.pid).children() if "EngineCore" in " ".join(child.cmdline())]
    engine.kill()
    assert process.wait(120) == 1, process.err
    talk = process.err
    assert "vLLM's engine died" in talk and "the same command goes on" in talk
    assert 8 <= len(hiddenlake.open_capture(out)) < SAMPLES
    assert verify(out).ok
