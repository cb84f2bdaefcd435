"""Arms: what a round costs is what its whole process tree burned, and a failure says why."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from _arms import Arm, ArmError, in_rotation

SCRIPT = str(Path(__file__).parent / "burning_arm.py")


@pytest.fixture
def arm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / "benchmarks" / "arms"))
    arms = []

    def start(fails: bool = False) -> Arm:
        arms.append(Arm("burning", sys.executable, SCRIPT, {"fails": fails}, tmp_path / "log"))
        return arms[-1]

    yield start
    for each in arms:
        each.close()


def test_cpu_seconds_of_the_round_alone(arm):
    burning = arm()
    burning.wait_until_ready()
    cost = burning.ask({"where": "here", "seconds": 0.5})
    assert 0.45 <= cost["cpu"] <= 0.65
    assert cost["wall"] >= cost["cpu"] - 0.02


def test_children_are_counted_and_end_with_their_arm(arm):
    burning = arm()
    burning.wait_until_ready()
    cost = burning.ask({"where": "child", "seconds": 0.5})
    child = psutil.Process(cost["pid"])
    # on a busy machine the child may not be through
    assert 0.1 <= cost["cpu"] <= 0.8
    burning.close()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a child outlived its arm"
        time.sleep(0.05)


def test_an_arm_that_does_not_start_says_why(arm):
    with pytest.raises(ArmError, match="burning ended: ValueError: no such model"):
        arm(fails=True).wait_until_ready()


def test_a_round_that_fails_says_why(arm):
    burning = arm()
    burning.wait_until_ready()
    with pytest.raises(ArmError, match="burning ended: RuntimeError: found 3, expected 4") as caught:
        burning.ask({"where": "nowhere"})
    assert caught.value.arm is burning


def test_everybody_is_first_once():
    assert [in_rotation("abc", r) for r in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
