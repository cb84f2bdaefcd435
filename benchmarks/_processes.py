"""Memory and file descriptors of this process and its children, followed through a run, and judged for growth."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

# Parts of a run: the first warms up, growth is from the second to the last.
_PARTS = 5


@dataclass(frozen=True)
class Usage:
    """Of one process. done : generations until then.

    heap : bytes of its own anonymous memory.  shared : its part of shared memory, where buffers between processes and
        rings lie.  rss : all that is mapped and there, files included.  descriptors : open.
    """

    done: int
    heap: int
    shared: int
    rss: int
    descriptors: int


class Processes:
    """usage : name of a process -> what it took, in the order of time.  shared : most bytes of shared memory in all."""

    def __init__(self) -> None:
        self.usage: dict[str, list[Usage]] = {}
        self.shared = 0
        self._names = {os.getpid(): "driver"}

    def look(self, done: int) -> None:
        shared = 0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name = self._names.setdefault(process.pid, f"{process.name()} {len(self._names)}")
                usage = _usage(process.pid, done)
            except (OSError, psutil.NoSuchProcess):
                continue  # it has just ended
            self.usage.setdefault(name, []).append(usage)
            shared += usage.shared
        self.shared = max(self.shared, shared)


def _usage(pid: int, done: int) -> Usage:
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    heap, shared, rss = (1024 * kib[name] for name in ("Pss_Anon", "Pss_Shmem", "Rss"))
    return Usage(done, heap, shared, rss, len(os.listdir(f"/proc/{pid}/fd")))


@dataclass(frozen=True)
class Growth:
    """What a process did after its first fifth.

    heap : bytes, from the second fifth's median to the last's.  generations : between these.
    slope : bytes of heap a generation, by least squares.
    descriptors : from the least in the second fifth to the least in the last, since files that are being written come
        and go.
    """

    heap: float
    generations: float
    slope: float
    descriptors: int


def growth(series: Sequence[Usage]) -> Growth:
    """Of at least five looks."""
    _, second, *others = _parts(series)
    rest = [usage for part in (second, *others) for usage in part]
    slope = np.polyfit([usage.done for usage in rest], [usage.heap for usage in rest], 1)[0]
    ends = second, others[-1]
    start, end = (np.median([[usage.heap, usage.done] for usage in part], axis=0) for part in ends)
    fewest = [min(usage.descriptors for usage in part) for part in ends]
    return Growth(*(end - start).tolist(), float(slope), fewest[1] - fewest[0])


def describe(series: Sequence[Usage]) -> str:
    """Five looks, one from the middle of each fifth, in words."""
    five = [part[len(part) // 2] for part in _parts(series)]
    columns = {of: " ".join(f"{getattr(look, of) / 2**20:.0f}" for look in five) for of in ("heap", "shared", "rss")}
    return (
        f"at {' '.join(str(look.done) for look in five)}: heap {columns['heap']} MiB, shared {columns['shared']}, "
        f"RSS {columns['rss']}, descriptors {' '.join(str(look.descriptors) for look in five)}"
    )


def _parts(series: Sequence[Usage]) -> list[list[Usage]]:
    return [[series[i] for i in part] for part in np.array_split(np.arange(len(series)), _PARTS)]
