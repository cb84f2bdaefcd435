"""Rows of a user's file: JSONL, CSV or TSV, UTF-8, each with where it stands for messages."""

import csv
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError

# What lies between the cells of a table.
_BETWEEN = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *_BETWEEN)

# Columns that hold lists.
_LISTS = ("answers", "wrong_answers")

# Looks at the column names of a row, and raises BadInputError.
Check = Callable[[Collection[str], str], None]


def read_rows(path: Path, check: Check, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, columns) of each row. Empty lines mean nothing.

    check : of the column names, called with where they stand.  example : a good row, for messages.

    Raises BadInputError, naming the line, for anything else.
    """
    if path.suffix not in SUFFIXES:
        raise BadInputError(f"{path}: expected a file whose name ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    if path.suffix in _BETWEEN:
        yield from _read_table(path, check, _BETWEEN[path.suffix])
        return
    for where, row in _read_jsonl(path, example):
        check(row, where)
        yield where, row


def columns_of(path: Path) -> set[str]:
    """Column names of a file's first row; none where it cannot be read: read_rows says why."""
    try:
        for _, row in read_rows(path, lambda *_: None, ""):
            return set(row)
    except BadInputError:
        pass
    return set()


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


def _read_jsonl(path: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInputError(
                f"{where}: not JSON at column {error.colno} ({error.msg}): expected one object a line, like {example}"
            ) from error
        if not isinstance(row, dict):
            raise BadInputError(f"{where}: found {kind(row)}: expected an object, like {example}")
        yield where, row


def _read_table(path: Path, check: Check, between: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_lines(path), delimiter=between, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            apart, name = ("commas", "CSV") if between == "," else ("tabs", "TSV")
            raise BadInputError(
                f'{where}: not {name} ({error}): expected cells apart by {apart}, quoted by "'
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise BadInputError(f"{where}: a column is named twice: {', '.join(header)}")
            check(header, where)
            continue
        if len(cells) != len(header):
            raise BadInputError(
                f"{where}: found {len(cells)} cells: expected {len(header)} ({', '.join(header)}); "
                f"a cell with a {'comma' if between == ',' else 'tab'} in it is quoted"
            )
        # An empty cell is how CSV leaves something out.
        row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
        check(row, where)
        for column in _LISTS:
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


def texts(value: Any, column: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadInputError(f"{where}: {column} is {kind(value)}: expected a list of strings")
    return tuple(text(item, f"{column}[{i}]", where).strip() for i, item in enumerate(value))


def text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"{where}: {column} is {kind(value)}: expected a string")
    if not value.strip():
        raise BadInputError(f"{where}: {column} is empty: expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadInputError(f"{where}: {column} holds half of a surrogate pair, which no tokenizer can read: repair it")
    return value


def kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
