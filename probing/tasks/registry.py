"""Tasks by name, or by the path of a file."""

from collections.abc import Callable
from pathlib import Path

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.samples import Task
from hiddenlake.probing.tasks.cities import cities
from hiddenlake.probing.tasks.file import SUFFIXES, file_task

TASKS: dict[str, Callable[[int | None], Task]] = {"cities": cities}


def load_task(name_or_path: str | Path, limit: int | None = None) -> Task:
    """A task by its name, or from a .jsonl or .csv file, with its first `limit` questions or all of them.

    Raises UnknownNameError for what is neither, and BadInputError for a file that cannot be used.
    """
    name = str(name_or_path)
    if name in TASKS:
        return TASKS[name](limit)
    if name.endswith(SUFFIXES):
        return file_task(name_or_path, limit)
    raise UnknownNameError(
        f"unknown task {name!r}: expected one of {', '.join(TASKS)}, or the path of a file "
        f"that ends in {' or '.join(SUFFIXES)} (see hiddenlake.probing.tasks.file)"
    )
