"""Tasks by name or path, and what is said of names that are neither."""

import json
from pathlib import Path

import pytest

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.probing.tasks import TASKS, load_task


def test_a_name() -> None:
    task = load_task("cities", 5)
    assert (task.name, len(task.questions)) == ("cities", 5)


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_path(tmp_path: Path, as_type: type) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answers": ["a"]}) + "\n" for i in range(4)))
    task = load_task(as_type(path), limit=3)
    assert (task.name, len(task.questions)) == ("mine", 3)


@pytest.mark.parametrize("name", ["", "citys", "cities.txt", "triviaqa", "/"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"cities, or the path of a file that ends in \.jsonl or \.csv"):
        load_task(name)


@pytest.mark.parametrize("name", [*TASKS, "absent.csv"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="limit is 0"):
        load_task(name, 0)


def test_an_absent_file_is_named() -> None:
    with pytest.raises(BadInputError, match=r"absent\.csv: no such file"):
        load_task("absent.csv")
