"""Growth: what is there from the start, comes and goes, or happens once, is none."""

import os
import subprocess
import sys

import pytest
from _processes import Processes, Usage, growth


def series(heap=lambda i: 0, descriptors=lambda i: 40):
    return [Usage(10 * i, heap(i), 0, 0, descriptors(i)) for i in range(100)]


def test_a_leak_is_seen():
    found = growth(series(heap=lambda i: 500 + 40 * i))
    assert (found.slope, found.heap, found.generations) == pytest.approx((4, 4 * 600, 600))


def test_warming_up_is_no_growth():
    found = growth(series(heap=lambda i: 1000 * min(i, 19), descriptors=lambda i: 40 + min(i, 19)))
    assert (found.slope, found.heap, found.descriptors) == (pytest.approx(0, abs=1e-9), 0, 0)


def test_files_that_come_and_go_are_no_leak_and_one_that_stays_is():
    assert growth(series(descriptors=lambda i: 40 + i % 3)).descriptors == 0
    assert growth(series(descriptors=lambda i: 40 + i % 3 + i // 50)).descriptors == 1


def test_children_are_followed_with_what_they_hold():
    processes = Processes()
    script = (
        "import mmap; held = bytearray(50 << 20), mmap.mmap(-1, 20 << 20); held[1].write(held[0][: 20 << 20]); "
        "print('ready', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    processes.look(1)
    descriptor = os.open(os.devnull, os.O_RDONLY)
    processes.look(2)
    os.close(descriptor)
    child.communicate("\n")
    processes.look(3)
    mine = processes.usage["driver"]
    assert [look.done for look in mine] == [1, 2, 3]
    [other] = [series for series in processes.usage.values() if [look.done for look in series] == [1, 2]]
    assert mine[1].descriptors == mine[0].descriptors + 1 and mine[0].rss > mine[0].heap > 0
    assert other[0].heap >= 50 << 20 and processes.shared >= other[0].shared >= 20 << 20
