"""Labels: columns that are added to a capture later, by sample key."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.tables import encode, parquet_table

if TYPE_CHECKING:
    import pyarrow

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")

# So many keys are shown of those that are wrong.
_SHOWN = 3


def add_label(capture: Capture, name: str, table: "str | Path | pyarrow.Table", replace: bool = False) -> int:
    """Store a table as labels/<name>.parquet. Returns how many of the capture's samples it labels.

    name : letters, digits and underscores; the variable that it becomes in `dataset()`.
    table : a Parquet or CSV file, or a table, with a column `key` and at least one more; one row a sample at most.
    replace : whether labels of this name may be there already.

    Raises BadInputError for keys that the capture does not hold, or that occur twice, and for a name that is taken.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _NAME.fullmatch(name):
        raise BadInputError(f"label {name!r}: expected letters, digits and underscores, no digit first")
    table = table if isinstance(table, pa.Table) else _load(Path(table))
    if "key" not in table.column_names or len(table.column_names) < 2:
        raise BadInputError(f"label {name!r}: columns {table.column_names}, expected `key` and at least one more")
    keys = table["key"].cast(pa.string())
    table = table.set_column(table.column_names.index("key"), "key", keys)
    if keys.null_count:
        raise BadInputError(f"label {name!r}: {keys.null_count} rows have no key")
    counts = pc.value_counts(keys.combine_chunks())
    twice = [entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1]
    if twice:
        raise BadInputError(
            f"label {name!r}: {len(twice)} keys occur twice ({', '.join(twice[:_SHOWN])}): label each once"
        )
    known = set(capture.keys)
    unknown = [key for key in keys.to_pylist() if key not in known]
    if unknown:
        raise BadInputError(
            f"label {name!r}: {len(unknown)} of {len(keys)} keys are not in {capture.path} "
            f"({', '.join(unknown[:_SHOWN])}): it has keys like {capture.keys[:1]}"
        )
    _check_free(capture, name, table)
    with capture.place.lock():
        if f"{name}.parquet" in capture.place.list_files("labels") and not replace:
            raise StoreError(f"{capture.path} has labels {name!r} already: name others, or replace them")
        write_label(capture.place, name, table)
    return len(keys)


def _check_free(capture: Capture, name: str, table: "pyarrow.Table") -> None:
    from hiddenlake.cache.store.view import label_columns, variable_names

    mine = label_columns(name, table)
    taken = variable_names(capture)
    for other, labelled in capture.labels().items():
        if other != name:
            taken |= set(label_columns(other, labelled))
    for column in mine:
        if column in taken:
            raise BadInputError(
                f"label {name!r} makes a variable {column!r}, which the capture has already: name it otherwise"
            )


def _load(file: Path) -> "pyarrow.Table":
    import pyarrow as pa
    import pyarrow.csv

    try:
        if file.suffix == ".csv":
            # Keys are hex digits: some look like numbers.
            options = pyarrow.csv.ConvertOptions(column_types={"key": pa.string()})
            # In this thread: see `parquet_table`.
            alone = pyarrow.csv.ReadOptions(use_threads=False)
            return pyarrow.csv.read_csv(file, alone, convert_options=options)
        if file.suffix == ".parquet":
            return parquet_table(file)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file}: cannot be read ({error}): expected a Parquet or CSV file") from error
    raise BadInputError(f"{file}: expected a name that ends in .parquet or .csv")


def write_label(place: Backend, name: str, table: "pyarrow.Table") -> None:
    """Write labels/<name>.parquet."""
    place.write(f"labels/{name}.parquet", encode(table))


def merge_labels(captures: Sequence[Capture], keys: Sequence[str]) -> dict[str, "pyarrow.Table"]:
    """The labels of several captures as one, of these samples only.

    Raises BadInputError where captures have labels of one name with other columns or types.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(list(keys), pa.string())
    found: dict[str, pa.Table] = {}
    for capture in captures:
        for name, table in capture.labels().items():
            table = table.filter(pc.is_in(table["key"], wanted))
            if name in found and found[name].schema != table.schema:
                raise BadInputError(
                    f"{capture.path}: labels {name!r} have other columns ({table.schema.names}) than those of the captures "
                    f"before it ({found[name].schema.names}): rename one of them"
                )
            found[name] = pa.concat_tables([found[name], table]) if name in found else table
    return found
