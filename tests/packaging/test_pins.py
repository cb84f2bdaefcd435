"""The pinned environment: everything is pinned, and the pins satisfy what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
FILES = ("cpu-torch.txt", "cpu.txt", "cpu-no-deps.txt")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]


def lines(name: str) -> list[Requirement]:
    text = (REPO / "requirements" / name).read_text("utf-8")
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


PINS = [pin for name in FILES for pin in lines(name)]


def test_every_pin_is_one_version() -> None:
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) and not pin.url for pin in PINS)
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert len(set(names)) == len(names)


def test_cuda_builds_are_not_pinned() -> None:
    names = {canonicalize_name(pin.name) for pin in PINS}
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & names
    assert not [name for name in names if name.startswith("nvidia")]


@pytest.mark.parametrize("extra", ["", "transformers", "report", "serve", "client", "demo", "dev"])
def test_the_pins_satisfy_the_project(extra: str) -> None:
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}
    asked = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, asked):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
