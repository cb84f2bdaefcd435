"""Prefetching: cells read ahead of whoever works on them, so that the disk is busy while a GPU, or a CPU, computes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hiddenlake.cache.store.readable import Readable

# Cells in memory beside the one in work: one that is ready, and one that is read.
AHEAD = 2


def iterate_cells(
    capture: Readable,
    site: str,
    layers: Any = None,
    positions: Any = None,
    samples: Any = None,
    *,
    ahead: int = AHEAD,
    **how: Any,
) -> Iterator[tuple[int | None, str, Any]]:
    """(layer, position, X) of every cell, layer by layer; layer is None for a site without layers.

    layers, positions, samples : as in `Readable.read`.  how : its `dtype`, `check` and `device`.
    ahead : cells that are read while one is in work; so many, and one more, are in memory.

    X is (sample, width). Errors are raised where the cell would have come. Stopping early waits for the cell that is read.
    """
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}: expected at least 1")
    every = capture.cell_names(site, layers, positions)
    with ThreadPoolExecutor(1, "hiddenlake-prefetch") as thread:
        waiting: deque[tuple[int | None, str, Future[Any]]] = deque()
        try:
            for layer, position in every:
                future = thread.submit(capture.read, site, layer, position, samples, **how)
                waiting.append((layer, position, future))
                if len(waiting) > ahead:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            for _, _, future in waiting:
                future.cancel()


def _next(waiting: deque[tuple[int | None, str, Future[Any]]]) -> tuple[int | None, str, Any]:
    layer, position, future = waiting.popleft()
    return layer, position, future.result()
