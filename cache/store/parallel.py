"""Many small files at once, where each takes a request."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hiddenlake.cache.store.backend import Backend

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(place: Backend, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `work` returns for each item, in their order. On a local disk one after the other: there, the parsing of what
    was read takes the time, and threads share one interpreter."""
    items = list(items)
    if place.exact or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(place.parallel, len(items)), "hiddenlake-files") as pool:
        return list(pool.map(work, items))
