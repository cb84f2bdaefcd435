"""Run: a grid as a job, kept cell by cell, shared by all who run it at once, and saved when it is complete."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.store.locks import FileLock
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.probing.checkpoint import in_progress
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.helper import Helper
from hiddenlake.probing.plan import Plan, n_threads
from hiddenlake.probing.saving import check_target, save_grid
from hiddenlake.probing.sweep import Progress

# For fewer a process is not started: others would have done most of them before it is there.
_CELLS_EACH = 25


def run_grid(
    capture: Any,
    site: str,
    out: str | Path,
    *,
    workers: int | None = None,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> xr.Dataset:
    """Fit a grid, and save it as `save_grid` does.

    Each finished cell is kept beside `out` until then. So the same call goes on where one was interrupted or killed, to the
    same bits; and several processes that make it at once, on machines that share the folder, share the cells. Each
    returns, and saves, the whole grid.

    out : the grid's folder.
    workers : processes on this machine, no more than there are cores and than the memory holds; they share its cores. By
        default one a core for a capture's grid on CPUs, where it has cells enough, else one. The paper's own fit
        (compat) takes threads of this process, whatever is asked for.
    planned, progress, arguments : those of fit_grid.

    Raises StoreError when `out` cannot be written, ProbeError for less than one worker, and what fit_grid raises.
    """
    out = Path(out)
    check_target(out)
    if isinstance(capture, (str, Path)):
        capture = open_capture(capture)
    stored = isinstance(capture, Capture)
    if workers is None:
        alone = not stored or arguments.get("device", "cpu") != "cpu"
        workers = 1 if alone else max(1, min(n_threads(), _n_cells(capture, **arguments) // _CELLS_EACH))
    if workers < 1 or (workers > 1 and not stored):
        raise ProbeError(f"workers is {workers}: expected 1 or more, and 1 for what is no stored capture")
    with in_progress(out) as folder, ExitStack() as helpers:

        def start(plan: Plan) -> None:
            if planned is not None:
                planned(plan)
            for _ in range(min(workers, plan.threads) - 1):
                helpers.enter_context(Helper(capture.path, site, folder, arguments | {"processes": workers}))

        grid = fit_grid(
            capture, site, checkpoint=folder, planned=start, progress=progress,
            processes=workers, **arguments,
        )  # fmt: skip
        with FileLock(folder / "lock"):
            save_grid(grid, out)
    return grid


def _n_cells(
    capture: Capture, layers: Sequence[int] | None = None, positions: Sequence[str] | None = None, **_: Any
) -> int:
    there = capture.coverage
    return len(there.layers if layers is None else layers) * len(there.positions if positions is None else positions)
