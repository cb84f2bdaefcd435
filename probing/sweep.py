"""Sweep: one function over every (layer, position) cell, read ahead of whoever works on them, on all cores."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.store.locks import FileLock
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.checkpoint import Checkpoint, drop
from hiddenlake.probing.plan import Plan, n_threads

Progress = Callable[[int, int], None]
Result = TypeVar("Result")

# Between two looks at cells that others work on.
_POLL_SECONDS = 0.2


class Buffer:
    """Memory that one cell after the other is read into."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Overwrites what was there before."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = None  # given back before more is taken
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Work(Generic[Result]):
    """A cell that is read and fitted. claim : where others may work on the same grid."""

    cell: tuple[int, int]
    buffer: Buffer
    loaded: Future
    fitted: Future[Result]
    claim: FileLock | None


def sweep(
    cells: Cells,
    mask: np.ndarray | None,
    kept: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray, int], Result],
    *,
    order: np.ndarray | None = None,
    borrow: dict[int, tuple[int, np.ndarray]] | None = None,
    plan: Plan | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, int], Result]:
    """Read and fit every cell, on as many threads as there are cores, BLAS on one thread each.

    mask : (position, sample) bool, or None for whatever is finite.  kept : (sample,) bool.
    fit : called with X (n, hidden) of the cells' dtype, which it must not keep, rows (n,) int, the samples that X holds,
        and the number of the position.
    order : (sample,) int, the order in which `fit` gets the samples; their own by default.
    borrow : for a position's number, another position's and the samples, (sample,) bool, that take their
        activations from there. The mask counts them already.
    plan : how many cells are in work and in memory; as many as there are cores by default.
    checkpoint : keeps each Cell that `fit` returns. What is finished there is not fitted again, and what others work on
        is waited for.

    Returns the results by (layer number, position number). Ctrl-C ends after the cells in work, which are kept too.
    """
    from hiddenlake.probing.solvers.problem import as_tensor, finite_rows

    def load(layer: int, position: int, buffer: Buffer) -> tuple[np.ndarray, np.ndarray]:
        inside = kept if mask is None else kept & mask[position]
        rows = np.flatnonzero(inside) if order is None else order[inside[order]]
        if not len(rows):
            return np.empty((0, cells.width), cells.dtype), rows
        X = cells.read(layer, position, rows, buffer.allocate)
        if borrow and position in borrow:
            other, borrowed = borrow[position]
            X[borrowed[rows]] = cells.read(layer, other, rows[borrowed[rows]])
        finite = finite_rows(as_tensor(X)).numpy()
        if mask is None:
            return _compact(X, finite), rows[finite]
        if not finite.all():
            raise ProbeError(
                f"layer {cells.layers[layer]}, position {cells.positions[position]}: "
                f"activations are NaN or infinite where `mask` says that there is a token"
            )
        return X, rows

    results: dict[tuple[int, int], Result] = {}
    waiting, elsewhere = deque(np.ndindex(cells.shape)), []
    plan = plan or Plan(n_threads())
    buffers = [Buffer() for _ in range(plan.threads + plan.ahead)]
    running: dict[Future[Result], _Work[Result]] = {}

    def finished(cell: tuple[int, int], found: Result) -> None:
        results[cell] = found
        if progress is not None:
            progress(len(results), cells.shape[0] * cells.shape[1])

    def begin(cell: tuple[int, int]) -> None:
        claim = None
        if checkpoint is not None:
            if (found := checkpoint.load(cell)) is not None:
                return finished(cell, found)
            if (claim := checkpoint.claim(cell)) is None:
                return elsewhere.append(cell)
            if (found := checkpoint.load(cell)) is not None:  # finished between these looks
                drop(claim)
                return finished(cell, found)
        buffer = buffers.pop()
        loaded = reader.submit(load, *cell, buffer)
        fitted = pool.submit(lambda: fit(*loaded.result(), cell[1]))
        running[fitted] = _Work(cell, buffer, loaded, fitted, claim)

    def end(work: _Work[Result]) -> Result:
        try:
            found = work.fitted.result()
            if checkpoint is not None:
                checkpoint.save(work.cell, found)
        finally:
            if work.claim is not None:
                drop(work.claim)
        buffers.append(work.buffer)
        return found

    # Threads of BLAS below threads over cells would fight for the same cores.
    with _one_thread_each(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(plan.threads) as pool:
        try:
            while waiting or elsewhere or running:
                while waiting and buffers:
                    begin(waiting.popleft())
                for future in wait(running, _POLL_SECONDS if elsewhere else None, FIRST_COMPLETED).done:
                    work = running.pop(future)
                    finished(work.cell, end(work))
                if elsewhere and not running:
                    time.sleep(_POLL_SECONDS)
                # What others have finished meanwhile counts now, and not when nothing else is left.
                waiting.extendleft(reversed(elsewhere))
                elsewhere.clear()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for work in running.values():
                if work.fitted.cancelled():
                    work.loaded.cancel()
            wait([fitted for fitted in running if not fitted.cancelled()])
            for work in running.values():
                # What is wrong was said already, or is the same here.
                with suppress(Exception):
                    end(work)
            raise
    return results


def _compact(X: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Some rows of X, moved to its start. chosen : (n,) bool."""
    if chosen.all():
        return X
    rows = np.flatnonzero(chosen)
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        X[start : start + len(part)] = X[part]
    return X[: len(rows)]


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
