"""The task of a user's own file: questions and gold answers from JSONL or CSV, judged by substring."""

import csv
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.probing.tasks import judging
from hiddenlake.probing.tasks.questions import check_limit, digest, make_question

SUFFIXES = (".jsonl", ".csv")

_EXAMPLE = '{"question": "Who wrote Emma?", "answers": ["Jane Austen", "Austen"]}'


@dataclass(frozen=True, slots=True)
class FileTask:
    """A task read from a file. Its name is the file's, without the suffix.

    digest : SHA-256 of the questions: two files of one name are told apart by it.
    """

    name: str
    rules: str
    questions: tuple[Question, ...]
    digest: str

    def judge(self, question: Question, answer: str) -> Judgement:
        """See `judging.judge_by_substring`."""
        return judging.judge_by_substring(question, answer)


def file_task(path: str | Path, limit: int | None = None) -> FileTask:
    """Read a task from a UTF-8 file with one question a row, of which the first `limit` are asked.

    Columns: `question` (text), `answers` (the gold answer and its aliases), and optionally
    `wrong_answers` (others that can be recognised) and `group` (rows of one group never lie on both
    sides of a split; the question's text where none is given). Other columns are not read.

    In JSONL each line is an object, with `answers` and `wrong_answers` as lists of strings. In CSV the
    first row names the columns, and the two are JSON lists or one string. Empty lines mean nothing.

    Raises BadInputError, naming the line, for anything else. The whole file is read and checked.
    """
    check_limit(limit)
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BadInputError(f"{path}: expected a file whose name ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    questions = tuple(_question(index, row, where) for index, (where, row) in enumerate(rows))
    if not questions:
        raise BadInputError(f"{path}: the file has no question: expected rows like {_EXAMPLE}")
    questions = questions[:limit]
    return FileTask(path.stem, judging.RULES, questions, digest(questions))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, with a byte order mark removed; named where they are not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInputError(
                    f"{path}, line {number}: byte {error.start + 1} is {line[error.start]:#04x}, which is not "
                    f"UTF-8: save the file as UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInputError(
                f"{where}: not JSON at column {error.colno} ({error.msg}): expected one object a line, like {_EXAMPLE}"
            ) from error
        if not isinstance(row, dict):
            raise BadInputError(f"{where}: found {_kind(row)}: expected an object, like {_EXAMPLE}")
        yield where, row


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BadInputError(f'{where}: not CSV ({error}): expected cells apart by commas, quoted by "') from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise BadInputError(f"{where}: a column is named twice: {', '.join(header)}")
            _require_columns(header, where)
            continue
        if len(cells) != len(header):
            raise BadInputError(
                f"{where}: found {len(cells)} cells: expected {len(header)} ({', '.join(header)}); "
                f"a cell with a comma in it is quoted"
            )
        # An empty cell is how CSV leaves something out.
        row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
        for column in ("answers", "wrong_answers"):
            if column in row:
                row[column] = _csv_list(row[column], column, where)
        yield where, row


def _csv_list(cell: str, column: str, where: str) -> Any:
    if not cell.lstrip().startswith("["):
        return [cell]
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{where}: {column} starts with [ but is not a JSON list ({error.msg}): expected one string, "
            f'or a list like ["Jane Austen", "Austen"] (in CSV each " inside a cell is written twice)'
        ) from error


def _question(index: int, row: dict[str, Any], where: str) -> Question:
    _require_columns(row, where)
    answers = _texts(row["answers"], "answers", where)
    if not answers:
        raise BadInputError(f"{where}: answers is empty: expected the gold answer and any aliases")
    wrong_answers = _texts(row.get("wrong_answers", []), "wrong_answers", where)
    both = {answer.lower() for answer in answers} & {answer.lower() for answer in wrong_answers}
    if both:
        raise BadInputError(f"{where}: {sorted(both)[0]!r} is both in answers and in wrong_answers: remove one")
    group = _text(row["group"], "group", where) if "group" in row else ""
    return make_question(index, _text(row["question"], "question", where), answers, wrong_answers, group)


def _require_columns(found: Collection[str], where: str) -> None:
    for column in ("question", "answers"):
        if column not in found:
            raise BadInputError(
                f"{where}: {column} is missing (found {', '.join(found) or 'nothing'}): expected question and answers, "
                f"like {_EXAMPLE}"
            )


def _texts(value: Any, column: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadInputError(f"{where}: {column} is {_kind(value)}: expected a list of strings")
    return tuple(_text(item, f"{column}[{i}]", where).strip() for i, item in enumerate(value))


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"{where}: {column} is {_kind(value)}: expected a string")
    if not value.strip():
        raise BadInputError(f"{where}: {column} is empty: expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadInputError(f"{where}: {column} holds half of a surrogate pair, which no tokenizer can read: repair it")
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
