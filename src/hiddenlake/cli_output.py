"""What commands share: their arguments, how they talk (stderr) and how they print (stdout)."""

import sys
from typing import Annotated, Any

import typer

from hiddenlake.cache.errors import BadInputError

# Samples failed, the rest is there.
EXIT_FAILED_SAMPLES = 3
EXIT_INTERRUPTED = 130

Capture = Annotated[str, typer.Argument(help="A capture: LAKE/NAME, or s3://BUCKET/LAKE/NAME.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def numbers(name: str, text: str) -> list[int]:
    """`0,5,10-12` in the order given."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise BadInputError(f"{name} {text!r}: expected numbers such as 13 or 0,5,10-12")
        found += range(int(first), int(last or first) + 1)
    return found


def talk(text: str) -> None:
    """To stderr: stdout is data."""
    print(text, file=sys.stderr)


def byte_count(name: str, text: str) -> int:
    """`2GiB`, `500MB` or a plain number of bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BGIKMbgikm")
    try:
        return int(float(number) * units[text.strip()[len(number) :].upper()])
    except (ValueError, KeyError) as error:
        raise BadInputError(f"{name} {text!r} is not a size: expected e.g. 2GiB, 500MB or a number of bytes") from error


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns, never cut: another program may read them."""
    if not rows:
        talk("nothing there")
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def outline(value: Any, indent: int = 0) -> str:
    """Nested facts as indented lines."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [" " * indent + f"{key}:", outline(item, indent + 2)]
        elif isinstance(item, list | tuple) and item and isinstance(item[0], dict):
            lines.append(" " * indent + f"{key}:")
            lines += [outline(entry, indent + 2) for entry in item]
        else:
            lines.append(" " * indent + f"{key}: {_cell(item)}")
    return "\n".join(lines)
