"""Writers that are killed at random moments, with several threads at work: what they acknowledged is there."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from hiddenlake.cache.store.verify import verify

KILLS = 68  # for each of three kinds: 200 in all
KILLS_A_CAPTURE = 14
SAMPLES = 2000  # more than any of them can write


@pytest.fixture
def forked(process, tmp_path):
    """Starts processes whose threads write; returns each one's number and the file of what it acknowledged."""
    parent = subprocess.Popen(
        [sys.executable, process, "fork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert parent.stdout.readline() == "ready\n"
    count = 0

    def start(path, kind):
        nonlocal count
        count += 1
        said = tmp_path / f"said {count}".replace(" ", "-")
        parent.stdin.write(f"{path} {SAMPLES} {kind} {said}\n")
        return int(parent.stdout.readline()), said

    yield start
    parent.stdin.close()
    parent.wait(30)
    parent.stdout.close()


def is_dead(child):
    """Whether all its threads are: the last one to go lets go of its files and locks."""
    # It is its parent that would wait for it: until then it stays, as a zombie.
    states = [open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0]]
    for thread in os.listdir(f"/proc/{child}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):
            states.append(open(f"/proc/{child}/task/{thread}/stat").read().rpartition(")")[2].split()[0])
    return set(states) <= {"Z", "X"}


def kill(child):
    assert not is_dead(child), "it ended by itself"
    os.kill(child, signal.SIGKILL)
    while not is_dead(child):
        time.sleep(0.001)


def acknowledged(said):
    """(how many samples were acknowledged at least, keys that were)."""
    published, flushed = 0, set()
    for line in said.read_text().splitlines(keepends=True) if said.exists() else ():
        word, _, rest = line.partition(" ")
        if line.endswith("\n") and word == "published":
            published = max(published, int(rest))
        elif line.endswith("\n"):
            flushed.update(rest.split())
    return published, flushed


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks in /proc whether a process is dead")
@pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
def test_what_was_acknowledged_survives_a_kill_at_any_moment(tiny, forked, tmp_path, assert_holds, kind):
    chance = random.Random(kind)
    killed = ever = 0
    longest = 0.15
    while killed < KILLS:
        path, safe = tmp_path / "lake" / f"numbers {killed}".replace(" ", "-"), set()
        for round_ in range(KILLS_A_CAPTURE):
            # Now and then two at a time, so that one that lives meets what a dead one left.
            children = [forked(path, kind) for _ in range(2 if round_ % 4 == 3 else 1)]
            for child, said in children:
                time.sleep(chance.uniform(0, longest))
                before = len(safe)
                kill(child)
                killed += 1
                held = set(assert_holds(path).keys) if (path / "zarr.json").exists() else set()
                published, flushed = acknowledged(said)
                assert safe | flushed <= held
                assert len(held) >= published and (len(children) > 1 or len(held) >= before + published)
                safe, ever = held, ever + published
                # On a machine that is busier, a process is given longer, so that it has something to lose.
                longest *= 1.1 if ever < 4 * killed else 0.95
        finish = len(safe) + 20
        tiny.write(path, finish, coverage=tiny.coverage(**tiny.KINDS[kind]))
        held = set(assert_holds(path).keys)
        assert safe <= held and {tiny.key(i) for i in range(finish)} <= held
        report = verify(path)
        assert report.ok, report.problems
        left = [name for _, _, names in os.walk(path) for name in names if name.endswith((".partial", ".jsonl"))]
        assert not left
    assert ever > 3 * KILLS, (ever, longest)


@pytest.mark.parametrize("old", [True, False])
def test_what_was_left_of_a_killed_maker_goes_once_it_is_old(tiny, tmp_path, old):
    """The newest is left alone: it may be one that another process is about to lock."""
    left = tmp_path / ".numbers.0123abcd.creating"
    (left / "writers").mkdir(parents=True)
    (left / "writers" / "lock").touch()
    other = tmp_path / ".letters.0123abcd.creating"
    other.mkdir()
    tiny.write(tmp_path / "numbers", 1)
    if old:
        os.utime(left, (0, 0))
        os.utime(other, (0, 0))
    tiny.write(tmp_path / "numbers", 2)
    assert left.exists() == (not old) and other.exists()
