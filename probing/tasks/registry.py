"""Tasks by name, or by the path of a file."""

from collections.abc import Callable
from pathlib import Path

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.samples import Task
from hiddenlake.probing.tasks.cities import cities
from hiddenlake.probing.tasks.file import file_task
from hiddenlake.probing.tasks.given import given_task
from hiddenlake.probing.tasks.rows import SUFFIXES, columns_of

TASKS: dict[str, Callable[[int | None], Task]] = {"cities": cities}


def load_task(name_or_path: str | Path, limit: int | None = None) -> Task:
    """A task by its name, or from a .jsonl or .csv file, with its first `limit` questions or all of them.

    A file with `question` and `answers` is asked (`file_task`); one with `prompt` and `answer`, or `text`, is fed as it
    is (`given_task`).

    Raises UnknownNameError for what is neither, and BadInputError for a file that cannot be used.
    """
    name = str(name_or_path)
    if name in TASKS:
        return TASKS[name](limit)
    if name.endswith(SUFFIXES):
        columns = columns_of(Path(name))
        given = "text" in columns or {"prompt", "answer"} <= columns
        return given_task(name, limit) if given and "question" not in columns else file_task(name, limit)
    raise UnknownNameError(
        f"unknown task {name!r}: expected one of {', '.join(TASKS)}, or the path of a file "
        f"that ends in {' or '.join(SUFFIXES)} (see hiddenlake.probing.tasks.file)"
    )
