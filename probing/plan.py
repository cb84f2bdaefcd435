"""Plan: how many cells of a grid are worked on at once, and how many of their columns, within a given memory."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.solvers.memory import projected

# Cells in memory beside those in work: one that is ready, and one that is read.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """threads : cells in work.  ahead : cells that are read meanwhile.  columns : of a fold, solved for at once; None for
    all.  memory_bytes : that cells and solvers take at most.
    """

    threads: int
    ahead: int = AHEAD
    columns: int | None = None
    memory_bytes: int = 0


def make_plan(
    n: int,
    d: int,
    itemsize: int,
    *,
    columns: int,
    n_folds: int,
    n_masks: int,
    memory: int | None = None,
    device_memory: int | None = None,
    processes: int = 1,
) -> Plan:
    """As many cells at once as there are cores, and as the memory holds.

    n, d, itemsize : samples of the largest cell, and their rows.  columns : of a fold.  n_folds, n_masks : see `projected`.
    memory : bytes for activations and solvers, beside what Python and its libraries take; by default half of what the
        machine has, or the container.  device_memory : bytes of the GPU that solves, where one does.
    processes : that share the cells and the memory, and each read ahead for themselves.

    Raises ProbeError where one cell with one column does not fit.
    """
    memory = total_memory() // 2 if memory is None else memory
    cell = n * d * itemsize

    def take(threads: int, ahead: int, k: int) -> int:
        held = threads + min(threads, processes) * ahead
        return held * cell + threads * projected(n, d, itemsize, k, n_folds, n_masks)

    def fits(threads: int, ahead: int, k: int) -> bool:
        on_device = threads * (cell + projected(n, d, itemsize, k, n_folds, n_masks, "cuda"))
        return take(threads, ahead, k) <= memory and (device_memory is None or on_device <= device_memory)

    for threads in range(n_threads(), 0, -1):
        for ahead in (AHEAD, 1):
            if fits(threads, ahead, columns):
                return Plan(threads, ahead, None, take(threads, ahead, columns))
    most = columns
    while most > 1:
        most = -(-most // 2)
        if fits(1, 0, most):
            return Plan(1, 0, most, take(1, 0, most))
    if fits(1, 0, 1):
        return Plan(1, 0, None, take(1, 0, 1))
    given = f"{memory / 2**30:.2f} GiB were given"
    if device_memory is not None:
        given += f", and the GPU has {device_memory / 2**30:.2f} GiB"
    raise ProbeError(
        f"the memory is too small: one cell of {n} samples x {d} takes {cell / 2**30:.2f} GiB, and with its solver up to "
        f"{take(1, 0, 1) / 2**30:.2f} GiB, but {given}: give more, or keep fewer samples"
    )


def total_memory() -> int:
    """Bytes of the machine, or of the container: unlike what is free, the same each time, and so is the plan."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # outside of a container, or without a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def n_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
