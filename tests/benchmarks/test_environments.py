"""Environments of rivals: pinned whole, and made again when an earlier build was interrupted."""

import re
from pathlib import Path

import _environments
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "requirements").glob("*.txt"))


def names(file: Path) -> list[str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) and not pin.url for pin in pins)
    return [canonicalize_name(pin.name) for pin in pins]


@pytest.mark.parametrize("file", PINS, ids=lambda file: file.stem)
def test_every_package_is_pinned_once_and_none_is_built_for_cuda(file):
    found = names(file)
    assert len(set(found)) == len(found)
    assert {*_environments.pinned(file.stem), "psutil"} <= set(found)
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "vllm"} & set(found)
    assert not [name for name in found if name.startswith("nvidia")]


def test_an_interrupted_build_starts_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HIDDENLAKE_CACHE", str(tmp_path))
    asked = []

    def run(*command):
        asked.append(" ".join(map(str, command)))
        if "venv" in command:
            command[-1].mkdir(parents=True)
        elif "vllm_lens.txt" in asked[-1] and len(asked) < 4:
            raise RuntimeError("no network")

    monkeypatch.setattr(_environments, "_run", run)
    with pytest.raises(RuntimeError, match="no network"):
        _environments.python_of("vllm_lens")
    [folder] = (tmp_path / "benchmarks").iterdir()
    (folder / "half").touch()
    python = _environments.python_of("vllm_lens")
    assert python == folder / "bin" / "python" and not (folder / "half").exists() and len(asked) == 6
    assert _environments.python_of("vllm_lens") == python and len(asked) == 6
