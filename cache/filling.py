"""Filling: a finished sample's rows go from where they waited to their place in the shards, once every check has passed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hiddenlake.cache.pools import Check, PromptPools, narrow, pool
from hiddenlake.cache.positions import POOLED
from hiddenlake.cache.rows import TapTable, put_rows
from hiddenlake.cache.store.shard import attach
from hiddenlake.cache.worker.plan import Placement

# token indices -> (token, element) of stored bits, or why they are not there
Rows = Callable[[Sequence[int]], np.ndarray | str]


class _Fault(Exception):
    """Why a sample cannot be stored."""


def fill(
    table: TapTable,
    placement: Placement,
    handles: Sequence[dict[str, Any]],
    rows: Rows,
    pools: PromptPools | None,
    check: Check,
) -> str | None:
    """Copy a sample's rows into its shards, or say why that cannot be done.

    handles : of the shards that the placement names by number.
    pools : of the sample's prompt, where some position is pooled over it.

    Nothing is written unless every cell can be: each token was captured, each value is finite, and each row's
    `embed` is bit for bit the embedding of the token that the answer has there.
    """

    def checked(tokens: Sequence[int]) -> np.ndarray:
        found = rows(tokens)
        if isinstance(found, str):
            raise _Fault(found)
        fault = check([placement.token_ids[t] for t in tokens], tokens, found) if len(tokens) else None
        if fault is not None:
            raise _Fault(fault)
        return found

    def pooled(function: str, start: int, stop: int) -> np.ndarray:
        q = placement.prompt_length
        if start < q and (pools is None or not pools.complete):
            raise _Fault(f"the prompt's rows were not all pooled ({0 if pools is None else pools.count} of {q})")
        rest = checked(range(max(start, q), stop))
        return narrow(pools.pooled(function, rest) if start < q else pool(function, rest), rest.dtype)

    try:
        writes = []
        if placement.handle is not None:
            index = placement.token_index
            if {p for p, *_ in placement.pools} != {p for p, token in enumerate(index) if token == POOLED}:
                raise ValueError(f"token_index {index} and pools {placement.pools} name different positions")
            columns = [p for p, token in enumerate(index) if token >= 0]
            writes.append((placement.handle, checked([index[p] for p in columns]), (columns, placement.slot)))
            if placement.pools:
                values = np.stack([pooled(function, start, stop) for _, function, start, stop in placement.pools])
                writes.append((placement.handle, values, ([p for p, *_ in placement.pools], placement.slot)))
        for piece in placement.pieces:
            tokens = range(*piece.tokens)
            writes.append((piece.handle, checked(tokens), (slice(piece.row, piece.row + len(tokens)),)))
    except _Fault as fault:
        return str(fault)
    for handle, values, place in writes:
        views = attach(handles[handle])
        put_rows(views, table.part(frozenset(views), tuple(placement.layers)), values, place)
    return None
