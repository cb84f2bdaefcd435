"""Ctrl-C, kill and a full disk: nothing that looks finished is left, and what is there is not written over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.exchange import target
from hiddenlake.cache.exchange.exporting import FORMATS, export_capture
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.vllm_dumps import VllmDumps
from hiddenlake.cache.store import open_capture

TRANSFER = Path(__file__).with_name("transfer.py")


def start(*arguments):
    command = [sys.executable, TRANSFER, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip


def stop_half_way(number, *arguments):
    process = start(*arguments)
    try:
        assert process.stdout.readline() == "half\n", process.stderr.read()
        process.send_signal(number)
        _, talk = process.communicate(timeout=60)
    finally:
        process.kill()
    return talk


@pytest.fixture
def lake(tiny, tmp_path):
    tiny.write(tmp_path / "lake", 400, 64)
    return tmp_path / "lake"


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_ctrl_c_half_way_leaves_nothing(lake, format):
    assert "KeyboardInterrupt" in stop_half_way(signal.SIGINT, "export", lake, lake.parent / "out", format, 0)
    assert os.listdir(lake.parent) == ["lake"]


@pytest.mark.slow
def test_what_a_killed_export_left_is_not_the_target_and_goes_with_the_next(lake):
    out = lake.parent / "out"
    stop_half_way(signal.SIGKILL, "export", lake, out, "safetensors", 0)
    (left,) = set(os.listdir(lake.parent)) - {"lake"}
    assert left.startswith(".out.") and not (lake.parent / left / target.MANIFEST).exists()
    # as if an hour had gone by; a living export is known by its lock
    old = time.time() - 3600
    os.utime(lake.parent / left, (old, old))
    other = start("export", lake, lake.parent / "out2", "safetensors", 0)
    assert other.stdout.readline() == "half\n"
    (living,) = lake.parent.glob(".out2.*")
    os.utime(living, (old, old))
    try:
        with pytest.raises(StoreError, match="exists already"):
            (lake.parent / "out2").mkdir()
            export_capture(lake, lake.parent / "out2")
        (lake.parent / "out2").rmdir()
        export_capture(lake, out)
        export_capture(lake, lake.parent / "out2")
        assert living.exists()
    finally:
        other.kill()
        other.communicate()
    assert set(os.listdir(lake.parent)) == {"lake", "out", "out2", living.name}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_write_that_fails_leaves_nothing(lake, format):
    process = start("export", lake, lake.parent / "out", format, 30_000)
    said, talk = process.communicate(timeout=120)
    assert said.startswith("StoreError"), talk
    assert "may not become that large" in said and "nothing was left behind" in said
    assert os.listdir(lake.parent) == ["lake"]


def test_a_disk_that_is_too_small_is_refused_before_the_start(captures, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(StoreError, match=r"the disk is too full: .* free some space"):
        export_capture(captures(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_an_existing_target_is_refused(captures, tmp_path, what):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "link": lambda: out.symlink_to("nowhere")}[what]()
    with pytest.raises(StoreError, match="exists already: name another folder"):
        export_capture(captures(), out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_that_comes_to_be_meanwhile_is_not_written_over(captures, tmp_path):
    from hiddenlake.cache.exchange.cost import Watcher

    class Faster(Watcher):
        def progressed(self, done, total):
            (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(StoreError, match="exists already"):
        export_capture(captures(), tmp_path / "out", watcher=Faster())
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def dump(folder, count, layers=3, width=24, seed=0):
    """vLLM's dumps of `count` prompts. Returns their states as float32, which bfloat16 holds exactly."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    every = []
    for i in range(count):
        tokens = 3 + i % 5
        states = torch.from_numpy(np.random.default_rng([seed, i]).normal(size=(tokens, layers, width))).bfloat16()
        save_file({"hidden_states": states, "token_ids": torch.arange(i, i + tokens)}, folder / f"req-{i}.safetensors")
        every.append(states.float().numpy())
    return every


@pytest.mark.slow
def test_an_interrupted_import_goes_on_and_a_finished_one_is_refused(tmp_path, identity):
    every = dump(tmp_path / "dumps", 40)
    out = tmp_path / "lake"
    arguments = ("import", tmp_path / "dumps", out, json.dumps(identity), 0)
    assert "KeyboardInterrupt" in stop_half_way(signal.SIGINT, *arguments)
    half = open_capture(out)
    assert 15 <= len(half) < 40 and half.planned == 40
    source = VllmDumps(tmp_path / "dumps", [0, 1, 2], "bfloat16", prompts_only=True)
    done = import_source(source, out, identity, shard_samples=2)
    assert (done.imported, done.present, done.failed) == (40 - len(half), len(half), 0)
    whole = open_capture(out)
    for i, states in enumerate(every):
        assert np.array_equal(
            whole.read_tokens("resid_post", None, [f"req-{i}"], dtype="float32").values.swapaxes(0, 1), states[:, 1:]
        )
    with pytest.raises(StoreError, match="exists already and holds all 40 samples"):
        import_source(source, out, identity)


def test_an_import_does_not_go_on_in_another_capture(tmp_path, identity, tiny):
    dump(tmp_path / "dumps", 3)
    dump(tmp_path / "others", 2)
    dump(tmp_path / "longer", 5, width=8)
    open_dumps = lambda name: VllmDumps(tmp_path / name, [0, 1, 2], "bfloat16", prompts_only=True)  # noqa: E731
    tiny.write(tmp_path / "captured", 3)
    with pytest.raises(StoreError, match="a capture that was not imported"):
        import_source(open_dumps("dumps"), tmp_path / "captured", identity)
    import_source(open_dumps("others"), tmp_path / "lake", identity)
    (tmp_path / "dumps/req-0.safetensors").write_bytes((tmp_path / "dumps/req-2.safetensors").read_bytes())
    with pytest.raises(StoreError, match="holds other token ids for 'req-0'"):
        import_source(open_dumps("dumps"), tmp_path / "lake", identity)
    from hiddenlake.cache.errors import IdentityError

    with pytest.raises(IdentityError):
        import_source(open_dumps("longer"), tmp_path / "lake", identity)
    with pytest.raises(StoreError, match="holds a sample 'req-1' that this source does not have"):
        (tmp_path / "longer/req-1.safetensors").unlink()
        import_source(open_dumps("longer"), tmp_path / "lake", identity)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(StoreError, match="is not empty and is no capture"):
        import_source(open_dumps("dumps"), tmp_path / "full", identity)
