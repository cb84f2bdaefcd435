"""Sweep: one function over every (layer, position) cell, read a cell at a time, on all cores."""

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import xarray as xr
from threadpoolctl import threadpool_limits

from hiddenlake.cache.errors import ProbeError

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


def sweep(
    activations: xr.DataArray,
    mask: np.ndarray | None,
    kept: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], Result],
    *,
    borrow: dict[int, tuple[int, np.ndarray]] | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, int], Result]:
    """Read and fit every cell, on as many threads as there are cores, BLAS on one thread each.

    activations : (layer, position, sample, hidden), with both coordinates.
    mask : (position, sample) bool, or None for whatever is finite.  kept : (sample,) bool.
    fit : called with X (n, hidden) and rows (n,) int, the samples that X holds.

    borrow : for a position's number, another position's and the samples, (sample,) bool, that take their
        activations from there. The mask counts them already.

    Returns the results by (layer number, position number). Ctrl-C ends after the cells in work.
    """
    activations = activations.transpose("layer", "position", "sample", ...)

    def work(layer: int, position: int) -> Result:
        rows = kept if mask is None else kept & mask[position]
        X = activations[layer, position].values if rows.any() else np.empty((len(rows), 1), np.float32)
        if borrow and position in borrow and rows.any():
            other, borrowed = borrow[position]
            X = X.copy()
            X[borrowed] = activations[layer, other].values[borrowed]
        if mask is None:
            rows = rows & np.isfinite(X).all(axis=1)
        elif not np.isfinite(X[rows]).all():
            raise ProbeError(
                f"layer {activations.layer.values[layer]}, position {activations.position.values[position]}: "
                f"activations are NaN or infinite where `mask` says that there is a token"
            )
        chosen = np.flatnonzero(rows)
        return fit(X[chosen], chosen)

    cells = [(layer, position) for layer in range(activations.shape[0]) for position in range(activations.shape[1])]
    results: dict[tuple[int, int], Result] = {}
    waiting = list(reversed(cells))
    # Threads of BLAS below threads over cells would fight for the same cores.
    with threadpool_limits(1), ThreadPoolExecutor(n_threads()) as pool:
        running = {}
        try:
            while waiting or running:
                # Few cells are handed out ahead, so that a failure or Ctrl-C is not followed by hundreds.
                while waiting and len(running) < 2 * n_threads():
                    cell = waiting.pop()
                    running[pool.submit(work, *cell)] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
                    if progress is not None:
                        progress(len(results), len(cells))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def n_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
