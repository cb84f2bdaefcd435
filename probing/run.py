"""Run: a grid as a job, kept cell by cell, shared by all who run it at once, and saved when it is complete."""

from pathlib import Path
from typing import Any

import xarray as xr

from hiddenlake.cache.store.locks import FileLock
from hiddenlake.probing.checkpoint import in_progress
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.saving import check_target, save_grid


def run_grid(capture: Any, site: str, out: str | Path, **arguments: Any) -> xr.Dataset:
    """Fit a grid, and save it as `save_grid` does.

    Each finished cell is kept beside `out` until then. So the same call goes on where one was interrupted or killed, to the
    same bits; and several processes that make it at once, on machines that share the folder, share the cells. Each
    returns, and saves, the whole grid.

    out : the grid's folder.  arguments : those of fit_grid.

    Raises StoreError when `out` cannot be written, and what fit_grid raises.
    """
    out = Path(out)
    check_target(out)
    with in_progress(out) as folder:
        grid = fit_grid(capture, site, checkpoint=folder, **arguments)
        with FileLock(folder / "lock"):
            save_grid(grid, out)
    return grid
