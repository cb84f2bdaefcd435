"""`make setup`: once while the pins stay the same, again when they change, and never half done.

It runs in a copy with a stand-in for Python that only writes down what it is asked, since the real one takes minutes.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TORCH_CPU = "--index-url https://download.pytorch.org/whl/cpu"

# Makes .venv/bin/python a copy of itself; fails once for each line of `failures` that an argument list holds.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
while read -r wanted; do
    if [[ "$*" == *"$wanted"* ]]; then sed -i 1d "{failures}"; exit 1; fi
done < "{failures}"
exit 0
"""


class Copy:
    """A copy of what `make setup` reads."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "repo"
        self.repo.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(REPO / name, self.repo / name)
        shutil.copytree(REPO / "requirements", self.repo / "requirements")
        self.log, self.failures = folder / "log", folder / "failures"
        self.failures.touch()
        self.python = folder / "python3.11"
        self.python.write_text(STAND_IN.format(log=self.log, failures=self.failures))
        self.python.chmod(0o755)

    def make(self, *arguments: str) -> tuple[int, list[str], str]:
        """(exit status, what Python was asked, stderr)"""
        self.log.write_text("")
        command = ["make", f"PYTHON={self.python}", *arguments]
        done = subprocess.run(command, cwd=self.repo, capture_output=True, text=True)
        return done.returncode, self.log.read_text().splitlines(), done.stderr

    def stamps(self) -> list[Path]:
        return list(self.repo.glob(".venv/.setup-*"))


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_the_order(copy: Copy) -> None:
    status, asked, _ = copy.make("setup")
    assert status == 0
    installs = [line.split(" install ")[1] for line in asked if " install " in line]
    assert asked[0] == "-m venv .venv"
    assert installs == [
        "--no-deps -r requirements/cpu-torch.txt",
        "-r requirements/cpu.txt",
        "--no-deps -r requirements/cpu-no-deps.txt",
        "--no-deps --no-build-isolation -e .",
    ]
    assert len(copy.stamps()) == 1


def test_a_second_call_does_nothing(copy: Copy) -> None:
    copy.make("setup")
    (copy.repo / "pyproject.toml").touch()
    status, asked, _ = copy.make("setup")
    assert (status, asked) == (0, [])


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "requirements/cpu.txt", "requirements/cpu-torch.txt", "requirements/cpu-no-deps.txt"]
)
def test_a_changed_pin_sets_up_again(copy: Copy, name: str) -> None:
    copy.make("setup")
    (before,) = copy.stamps()
    with (copy.repo / name).open("a") as file:
        file.write("# changed\n")
    status, asked, _ = copy.make("setup")
    assert status == 0 and len(asked) == 5
    (after,) = copy.stamps()
    assert before != after


@pytest.mark.parametrize("step", ["-m venv", "-r requirements/cpu.txt", "cpu-no-deps.txt", "-e ."])
def test_an_interrupted_setup_starts_again_from_nothing(copy: Copy, step: str) -> None:
    copy.failures.write_text(step + "\n")
    status, _, _ = copy.make("setup")
    assert status != 0 and not copy.stamps()
    (copy.repo / ".venv" / "half").touch()
    status, asked, said = copy.make("setup")
    assert status == 0 and len(asked) == 5 and len(copy.stamps()) == 1
    assert "interrupted" in said and not (copy.repo / ".venv" / "half").exists()


def test_torch_comes_from_its_own_index_where_pip_does_not_know_it(copy: Copy) -> None:
    copy.failures.write_text("cpu-torch.txt\n")
    status, asked, said = copy.make("setup")
    assert status == 0 and len(copy.stamps()) == 1
    assert [line for line in asked if TORCH_CPU in line] == [asked[2]]
    assert "trying https://download.pytorch.org/whl/cpu" in said


def test_an_absent_python_is_named(copy: Copy) -> None:
    copy.python.unlink()
    status, _, said = copy.make("setup")
    assert status != 0 and "install Python 3.11" in said and not (copy.repo / ".venv").exists()


@pytest.mark.parametrize("target", ["test", "demo"])
def test_what_a_cpu_needs_is_exported(copy: Copy, target: str) -> None:
    with (copy.repo / "Makefile").open("a") as file:
        file.write(f"{target}: environment\nenvironment: setup\n\t@env > environment\n")
    copy.make(target)
    environment = (copy.repo / "environment").read_text().splitlines()
    for setting in (
        "OMP_NUM_THREADS=1",
        "VLLM_CPU_OMP_THREADS_BIND=nobind",
        "VLLM_CPU_KVCACHE_SPACE=1",
        "HF_HUB_OFFLINE=1",
        "VLLM_NO_USAGE_STATS=1",
        "DO_NOT_TRACK=1",
    ):
        assert setting in environment


def test_continuous_integration_runs_make_test() -> None:
    script = REPO / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "exec make test"
