"""Samples of a capture: filtered, by key, and by the tokens in them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.positions import ABSENT, POOLED
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.snapshot import Snapshot, samples_of

if TYPE_CHECKING:
    import pyarrow

# Texts of so many captures, as of one moment each, stay in memory.
_HELD = 4

# Columns of samples that can be filtered by, as labels can.
_LABELS = ("correct", "exact_answer_valid", "group", "finish_reason", "status", "sample_index", "index")

# Where a sample lies is the store's business.
_INNER = ("slot", "checksum")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which samples. label, value : a column and what it is, as text.  text : part of prompt or answer.  keys : only these."""

    label: str | None = None
    value: str | None = None
    text: str | None = None
    keys: tuple[str, ...] | None = None


def find_samples(capture: Capture, chosen: Filter, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """(how many there are, those from `offset` on), in task order. Raises Problem (409) for a label that is not there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from hiddenlake.cache.store.view import labels_of

    snapshot = capture.snapshot
    table = _table(snapshot)
    labels = labels_of(capture, snapshot)
    keep = np.ones(len(table), bool)
    if chosen.keys is not None:
        keep &= pc.is_in(table["key"], pa.array(chosen.keys, pa.string())).to_numpy(zero_copy_only=False)
    if chosen.text is not None:
        within = [pc.match_substring(table[name], chosen.text, ignore_case=True) for name in ("prompt", "answer")]
        keep &= pc.or_(*within).to_numpy(zero_copy_only=False)
    if chosen.label is not None:
        keep &= np.array([_text(value) == chosen.value for value in _column(table, labels, chosen.label)], bool)
    rows = np.flatnonzero(keep)
    page = table.take(pa.array(rows[offset : offset + limit], pa.int64())).drop_columns(_INNER).to_pylist()
    for sample, row in zip(page, rows[offset : offset + limit].tolist(), strict=True):
        sample["row"] = row
        sample["labels"] = {name: plain(values[row]) for name, values in labels.items()}
        _finish(capture, sample)
    return len(rows), page


def sample_row(capture: Capture, key: str) -> dict[str, Any] | None:
    """One sample, as `find_samples` gives it."""
    _, found = find_samples(capture, Filter(keys=(key,)), 0, 1)
    return found[0] if found else None


def find_tokens(capture: Capture, id: int, captured: bool, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """(how many there are, the first of them): where a token id occurs in the samples' prompts and answers.

    captured : only where there is an activation.
    """
    snapshot = capture.snapshot
    table = _table(snapshot)
    stored = _stored_tokens(snapshot) if captured else None
    found, total = [], 0
    columns = [table[name].to_pylist() for name in ("key", "prompt_length")]
    ids = table["token_ids"]
    for row, (key, prompt_length) in enumerate(zip(*columns, strict=True)):
        at = np.flatnonzero(np.asarray(ids[row].values) == id)
        if stored is not None:
            at = at[np.isin(at, stored(row))]
        total += len(at)
        for token in at[: max(0, limit - len(found))].tolist():
            positions = (snapshot.cell_tokens[:, row] == token).nonzero()[0] if capture.coverage.positions else ()
            found.append(
                {
                    "sample": key,
                    "row": row,
                    "token_index": token,
                    "in_answer": token >= prompt_length,
                    "positions": [capture.coverage.positions[p] for p in positions],
                }
            )
    return total, found


def _stored_tokens(snapshot: Snapshot) -> Any:
    """row -> token indices of which there is an activation."""
    c = snapshot.root.coverage

    def of(row: int) -> np.ndarray:
        parts = [np.empty(0, np.int64)]
        if c.positions:
            parts.append(snapshot.cell_tokens[:, row])
        if c.tokens is not None:
            start = int(snapshot.token_offsets[row])
            parts.append(snapshot.token_index[start : start + int(snapshot.token_length[row])])
        return np.concatenate(parts)

    return of


@lru_cache(maxsize=_HELD)
def _table(snapshot: Snapshot) -> "pyarrow.Table":
    return samples_of(snapshot)


def _column(table: "pyarrow.Table", labels: dict[str, Any], name: str) -> Iterator[Any]:
    if name in labels:
        return iter(labels[name])
    if name in _LABELS:
        return iter(table[name].to_pylist())
    raise Problem(
        409, "not_captured", "this capture has no label of that name", "filter by one that is there",
        there={"labels": [*_LABELS, *sorted(labels)]},
    )  # fmt: skip


def _text(value: Any) -> str:
    value = plain(value)
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def plain(value: Any) -> Any:
    """As JSON has it, whatever a user's label holds: what is not a number is null, bytes are hex digits, half a character is `?`."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {plain(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finish(capture: Capture, sample: dict[str, Any]) -> None:
    """Positions by name; what is absent or pooled says so."""
    special = {ABSENT: None, POOLED: "pooled"}
    index = sample.pop("token_index")
    sample["positions"] = {
        name: special.get(token, token) for name, token in zip(capture.coverage.positions, index, strict=True)
    }
    sample["logprobs"] = [plain(value) for value in sample["logprobs"]]
