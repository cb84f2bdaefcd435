"""`hiddenlake export` and `hiddenlake import`: stdout is data, stderr is talk, and the exit status tells."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hiddenlake.cache.store import open_capture

torch = pytest.importorskip("torch")


def run(*arguments, status=0):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "hiddenlake.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_there_and_back_again(captures, tmp_path):
    capture = captures()
    out, talk = run("export", capture.path, tmp_path / "out", "--shard-bytes", "4KB", "--json")
    assert json.loads(out)["samples"] == 23 and json.loads(out)["format"] == "safetensors"
    assert "23 samples, 42 files: 104832 bytes (102.4 KiB) of activations" in talk and "of disk free" in talk
    out, talk = run("import", tmp_path / "out", tmp_path / "again", "--format", "export")
    assert out == "" and "23 samples imported" in talk
    assert np.array_equal(
        open_capture(tmp_path / "again").read("mlp_out").view(np.uint16), capture.read("mlp_out").view(np.uint16)
    )
    _, talk = run("import", tmp_path / "out", tmp_path / "again", "--format", "export", status=1)
    assert talk.splitlines()[-1].startswith("error: ") and "exists already" in talk
    _, talk = run("export", capture.path, tmp_path / "out", "--format", "npy", status=1)
    assert talk.startswith("error: ") and "exists already" in talk
    _, talk = run("export", capture.path, tmp_path / "npy", "--format", "npy", "--site", "embed", "--positions=-1")
    assert [path.name for path in (tmp_path / "npy").rglob("*.npy")] == ["embed.npy"]


@pytest.mark.slow
def test_dumps_of_vllm(tmp_path, identity):
    from safetensors.torch import save_file

    (tmp_path / "d").mkdir()
    states = torch.randn(3, 2, 8).bfloat16()
    save_file({"hidden_states": states, "token_ids": torch.arange(3)}, tmp_path / "d/a.safetensors")
    save_file({"hidden_states": states * torch.nan, "token_ids": torch.arange(3)}, tmp_path / "d/b.safetensors")
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    command = ["import", tmp_path / "d", tmp_path / "lake", "--format", "vllm"]
    known = ["--identity", tmp_path / "identity.json", "--layer-ids", "0,5", "--prompts-only", "--json"]
    out, talk = run(*command, *known, status=3)
    assert (json.loads(out)["imported"], json.loads(out)["failed"]) == (1, 1)
    assert "finite" in talk and "no texts were given" in talk
    found = open_capture(tmp_path / "lake").read_tokens("resid_post", 4, dtype="float32").values
    assert np.array_equal(found, states[:, 1].float().numpy())
    for arguments, message in [
        ([*command, "--layer-ids", "0,5", "--prompts-only"], "--identity names what made the activations"),
        ([*command, *known[:2], "--layer-ids", "0-x"], "--layer-ids '0-x': expected numbers"),
        ([*command[:-1], "numpy", *known], "--format 'numpy': expected vllm, jsonl or export"),
    ]:
        _, talk = run(*arguments, status=1)
        assert message in talk


@pytest.mark.slow
def test_jsonl(tmp_path, identity):
    from safetensors.torch import save_file

    x = torch.randn(2, 3, 1, 8)
    save_file({"x": x, "e": x[:, 0].contiguous()}, tmp_path / "a.safetensors")
    lines = [
        {
            "key": f"k{i}", "token_ids": [1, 2], "prompt_length": 1,
            "activations": {
                "mlp_out": {"file": "a.safetensors", "tensor": "x", "row": i},
                "embed": {"file": "a.safetensors", "tensor": "e", "row": i},
            },
        }
        for i in range(2)
    ]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "identity.json").write_text(json.dumps(identity | {"compute_dtype": "float32"}))
    run(
        "import", tmp_path / "s.jsonl", tmp_path / "lake", "--format", "jsonl", "--identity", tmp_path / "identity.json",
        "--layers", "4-6", "--positions=-1",
    )  # fmt: skip
    capture = open_capture(tmp_path / "lake")
    assert capture.coverage.layers == (4, 5, 6)
    assert np.array_equal(capture.read("mlp_out", position="-1").swapaxes(0, 1), x[:, :, 0].numpy())
