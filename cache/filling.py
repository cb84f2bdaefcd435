"""Filling: a finished sample's rows go from where they waited to their place in the shards, once every check has passed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hiddenlake.cache.pools import Check, Pool, PromptPool, blocks
from hiddenlake.cache.positions import POOLED
from hiddenlake.cache.rows import TapTable, put_rows
from hiddenlake.cache.store.shard import attach
from hiddenlake.cache.worker.plan import Placement

# token indices -> (token, element) of stored bits, or why they are not there
Rows = Callable[[Sequence[int]], np.ndarray | str]

# handle, tokens, and how many of them were written before, and are now -> index into the shard's axes
_Write = tuple[int, Sequence[int], Callable[[int, int], tuple]]


class _Fault(Exception):
    """Why a sample cannot be stored."""


def fill(
    table: TapTable,
    placement: Placement,
    handles: Sequence[dict[str, Any]],
    rows: Rows,
    pool: PromptPool | None,
    check: Check,
) -> str | None:
    """Copy a sample's rows into its shards, or say why that cannot be done.

    handles : of the shards that the placement names by number.
    pool : of the sample's prompt, where some position is pooled over it.

    Nothing is written unless every cell can be: each token was captured, each value is finite, and each row's
    `embed` is bit for bit the embedding of the token that the answer has there.
    """
    try:
        writes = list(_writes(placement))
        kept = [_check_all(table, placement, tokens, rows, check) for _, tokens, _ in writes]
        pooled = _pooled(table, placement, rows, pool, check)
        for (handle, tokens, place), found in zip(writes, kept, strict=True):
            views = attach(handles[handle])
            part = table.part(frozenset(views), tuple(placement.layers))
            done = 0
            # the rows of a long sample are read again, so that they take no memory of their own
            for values in _blocks(table, tokens, rows) if found is None else [found]:
                put_rows(views, part, values, place(done, done + len(values)))
                done += len(values)
        if pooled:
            views = attach(handles[placement.handle])
            columns = [p for p, *_ in placement.pools]
            part = table.part(frozenset(views), tuple(placement.layers))
            put_rows(views, part, np.stack(pooled), (columns, placement.slot))
    except _Fault as fault:
        return str(fault)
    return None


def _writes(placement: Placement) -> Iterator[_Write]:
    if placement.handle is not None:
        index = placement.token_index
        if {p for p, *_ in placement.pools} != {p for p, token in enumerate(index) if token == POOLED}:
            raise ValueError(f"token_index {index} and pools {placement.pools} name different positions")
        columns = [p for p, token in enumerate(index) if token >= 0]
        yield placement.handle, [index[p] for p in columns], lambda i, j: (columns[i:j], placement.slot)
    for piece in placement.pieces:
        yield piece.handle, range(*piece.tokens), lambda i, j, row=piece.row: (slice(row + i, row + j),)


def _blocks(table: TapTable, tokens: Sequence[int], rows: Rows) -> Iterator[np.ndarray]:
    for part in blocks(tokens, len(table)):
        found = rows(part)
        if isinstance(found, str):
            raise _Fault(found)
        yield found


def _checked(
    table: TapTable, placement: Placement, tokens: Sequence[int], rows: Rows, check: Check
) -> Iterator[np.ndarray]:
    done = 0
    for found in _blocks(table, tokens, rows):
        part = tokens[done : done + len(found)]
        if fault := check([placement.token_ids[t] for t in part], part, found):
            raise _Fault(fault)
        done += len(found)
        yield found


def _check_all(
    table: TapTable, placement: Placement, tokens: Sequence[int], rows: Rows, check: Check
) -> np.ndarray | None:
    """The rows, where all of them are one block."""
    found = None
    for found in _checked(table, placement, tokens, rows, check):
        pass
    return found if found is not None and len(found) == len(tokens) else None


def _pooled(
    table: TapTable, placement: Placement, rows: Rows, pool: PromptPool | None, check: Check
) -> list[np.ndarray]:
    """(element,) as stored bits of each pooled position."""
    q = placement.prompt_length
    totals: dict[tuple[int, int], Pool] = {}
    for _, _, start, stop in placement.pools:
        if (start, stop) in totals:
            continue
        total = Pool([function for _, function, *span in placement.pools if span == [start, stop]])
        if start < q:
            if pool is None or not pool.complete:
                raise _Fault(f"the prompt's rows were not all pooled ({0 if pool is None else pool.count} of {q})")
            total = pool.total.copy()
        for found in _checked(table, placement, range(max(start, q), stop), rows, check):
            total.add(found)
        totals[start, stop] = total
    return [totals[start, stop].result(function) for _, function, start, stop in placement.pools]
