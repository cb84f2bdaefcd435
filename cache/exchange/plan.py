"""Plan: what one format will write of a selection, decided and counted before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hiddenlake.cache.exchange.selection import Selection, pack
from hiddenlake.cache.exchange.target import Target


@dataclass(frozen=True, slots=True)
class Plan:
    """One export, ready to be written.

    data_bytes : of the activations' files, headers left out.
    files : their number.
    memory_bytes : most that activations take at a time.
    facts : what the manifest says of the format.
    places : columns of the index that say where a sample's activations lie.
    write : (target, function to call with the bytes of each block).
    index : name of the samples' table, or None where the format holds the columns itself.
    card : the text of README.md, or None.
    note : is said before the start.
    """

    data_bytes: int
    files: int
    memory_bytes: int
    facts: dict[str, Any]
    write: Callable[[Target, Callable[[int], None]], None]
    places: dict[str, np.ndarray] = field(default_factory=dict)
    index: str | None = "index.parquet"
    card: str | None = None
    note: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Shards:
    """How an export's samples are cut into files: the same for every site and layer, so that one column says which.

    cells, tokens : rows (start, stop) of each file, in task order; () where there are no cells, or no tokens.
    """

    cells: tuple[range, ...]
    tokens: tuple[range, ...]

    @property
    def count(self) -> int:
        """Files a part."""
        return len(self.cells) + len(self.tokens)

    def places(self, selection: Selection) -> dict[str, np.ndarray]:
        """Columns of the index: `shard` (from 1) and `shard_row`, `token_shard` and `token_row` of the first token."""
        count = len(selection)
        found: dict[str, np.ndarray] = {}
        if self.cells:
            found |= {"shard": np.empty(count, np.int32), "shard_row": np.empty(count, np.int64)}
        if self.tokens:
            found |= {"token_shard": np.empty(count, np.int32), "token_row": np.empty(count, np.int64)}
            found["token_count"] = selection.lengths
        for number, rows in enumerate(self.cells, 1):
            found["shard"][rows.start : rows.stop] = number
            found["shard_row"][rows.start : rows.stop] = np.arange(len(rows))
        for number, rows in enumerate(self.tokens, 1):
            lengths = selection.lengths[rows.start : rows.stop]
            found["token_shard"][rows.start : rows.stop] = number
            found["token_row"][rows.start : rows.stop] = np.cumsum(lengths) - lengths
        return found


def cut(selection: Selection, shard_bytes: int) -> Shards:
    """Shards of at most `shard_bytes` for the widest site, of whole samples."""
    row_bytes = max(part.width for part in selection.parts) * selection.itemsize
    cells: list[tuple[int, int]] = []
    if selection.positions:
        cells = pack(np.full(len(selection), len(selection.positions) * row_bytes), shard_bytes)
    tokens = pack(selection.lengths * row_bytes, shard_bytes) if selection.tokens else []
    return Shards(tuple(range(*run) for run in cells), tuple(range(*run) for run in tokens))


def shard_name(stem: str, number: int, count: int, ending: str) -> str:
    """`resid_post/layer_13-00001-of-00004.safetensors`, as sharded files on the hub are named."""
    return f"{stem}-{number:05d}-of-{count:05d}.{ending}"
