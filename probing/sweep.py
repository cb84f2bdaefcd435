"""Sweep: one function over every (layer, position) cell, read a cell at a time, on all cores."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.cells import Cells

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


def sweep(
    cells: Cells,
    mask: np.ndarray | None,
    kept: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], Result],
    *,
    order: np.ndarray | None = None,
    borrow: dict[int, tuple[int, np.ndarray]] | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, int], Result]:
    """Read and fit every cell, on as many threads as there are cores, BLAS on one thread each.

    mask : (position, sample) bool, or None for whatever is finite.  kept : (sample,) bool.
    fit : called with X (n, hidden) and rows (n,) int, the samples that X holds.
    order : (sample,) int, the order in which `fit` gets the samples; their own by default.
    borrow : for a position's number, another position's and the samples, (sample,) bool, that take their
        activations from there. The mask counts them already.

    Returns the results by (layer number, position number). Ctrl-C ends after the cells in work.
    """

    def work(layer: int, position: int) -> Result:
        rows = kept if mask is None else kept & mask[position]
        X = cells.read(layer, position) if rows.any() else np.empty((len(rows), 1), np.float32)
        if borrow and position in borrow and rows.any():
            other, borrowed = borrow[position]
            X = X.copy()
            X[borrowed] = cells.read(layer, other)[borrowed]
        if mask is None:
            rows = rows & np.isfinite(X).all(axis=1)
        elif not np.isfinite(X[rows]).all():
            raise ProbeError(
                f"layer {cells.layers[layer]}, position {cells.positions[position]}: "
                f"activations are NaN or infinite where `mask` says that there is a token"
            )
        chosen = np.flatnonzero(rows) if order is None else order[rows[order]]
        return fit(X[chosen], chosen)

    every = list(np.ndindex(cells.shape))
    results: dict[tuple[int, int], Result] = {}
    waiting = every[::-1]
    # Threads of BLAS below threads over cells would fight for the same cores.
    with _one_thread_each(), ThreadPoolExecutor(n_threads()) as pool:
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
                        progress(len(results), len(every))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """BLAS, and torch, which has threads of its own, on one thread for each that calls them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def n_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
