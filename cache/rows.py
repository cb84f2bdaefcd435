"""Rows: one token's taps packed side by side, and the checks that rows pass before they are stored. Pure NumPy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np

from hiddenlake.cache.sites import SITES


@dataclass(frozen=True, slots=True)
class Block:
    """One site's place in a packed row.

    layers : block indices whose values lie there, ascending and consecutive in the coverage; () where the site has none.
    first : place of the first of them on the store's layer axis.
    offset : where the block starts in the row, in elements.
    width : elements a layer, in this process.  column : where they start in the site's whole width, which tensor
        parallelism splits.
    """

    site: str
    layers: tuple[int, ...]
    first: int
    offset: int
    width: int
    column: int = 0

    @property
    def end(self) -> int:
        return self.offset + max(1, len(self.layers)) * self.width

    def layer_offset(self, layer: int) -> int:
        """Where one layer's values start in the row."""
        return self.offset + (self.layers.index(layer) * self.width if self.layers else 0)


@dataclass(frozen=True, slots=True)
class TapTable:
    """What a packed row holds: the coverage's sites in order, then `embed`, then what only the canary reads.

    canary : block of the stream leaving the last layer, or None in a process that does not have it. It may be a layer
        of a stored block.
    stored : elements that are stored; those behind them are the canary's own.
    """

    blocks: tuple[Block, ...]
    canary: Block | None
    stored: int

    def __len__(self) -> int:
        """Elements of a row."""
        return max(self.stored, self.canary.end if self.canary else 0)

    @property
    def embed(self) -> Block | None:
        return next((block for block in self.blocks if block.site == "embed"), None)

    def taps(self) -> Iterator[tuple[str, int, int, int]]:
        """(site, layer, offset, width) of each tap; layer 0 where the site has none."""
        own = self.canary is not None and self.canary.offset >= self.stored
        for block in (*self.blocks, *((self.canary,) if own else ())):
            for layer in block.layers or (0,):
                yield block.site, layer, block.layer_offset(layer) if block.layers else block.offset, block.width

    def part(self, sites: frozenset[str], layers: tuple[int, ...]) -> tuple[Block, ...]:
        """Where a coverage of some of these sites and layers finds its own: `first` is a place on its layer axis."""
        return _part(self, sites, layers)


@lru_cache(maxsize=64)
def _part(table: TapTable, sites: frozenset[str], layers: tuple[int, ...]) -> tuple[Block, ...]:
    blocks = []
    for block in table.blocks:
        if block.site not in sites:
            continue
        if not block.layers:
            blocks.append(block)
        mine = [layer for layer in layers if layer in block.layers]
        lag = [block.layers.index(layer) - i for i, layer in enumerate(mine)]
        # a block for each run of layers that lie side by side in the row
        for _, group in groupby(zip(lag, mine, strict=True), itemgetter(0)):
            run = tuple(layer for _, layer in group)
            first, offset = layers.index(run[0]), block.layer_offset(run[0])
            blocks.append(Block(block.site, run, first, offset, block.width, block.column))
    return tuple(blocks)


def tap_table(
    sites: Sequence[str],
    layers: Sequence[int],
    widths: Mapping[str, int],
    n_layers: int,
    *,
    owned: range | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> TapTable:
    """The taps of one process.

    widths : kind of width -> elements, of the whole model.
    owned : layers of this pipeline stage, all by default.
    rank, ranks : of tensor parallelism. The residual stream and the modules' outputs are the same on every rank and
        are taken from rank 0; the inputs of row-parallel projections (`attn_z`, `mlp_act`) are split by columns.
    """
    owned = range(n_layers) if owned is None else owned
    mine = [layer for layer in layers if layer in owned]
    blocks, offset = [], 0
    for site in (*sites, "embed"):
        kind = SITES[site].width
        split = ranks if kind != "hidden" else 1
        if split == 1 and rank > 0:
            continue
        if SITES[site].layered:
            place: tuple[int, ...] = tuple(mine)
            if not place:
                continue
        elif (0 if site == "embed" else n_layers - 1) in owned:
            place = ()
        else:
            continue
        width = widths[kind] // split
        first = list(layers).index(place[0]) if place else 0
        blocks.append(Block(site, place, first, offset, width, rank * width if split > 1 else 0))
        offset = blocks[-1].end
    canary = None
    if n_layers - 1 in owned and rank == 0:
        stream = next((b for b in blocks if b.site == "resid_post" and n_layers - 1 in b.layers), None)
        at = offset if stream is None else stream.layer_offset(n_layers - 1)
        canary = Block("resid_post", (n_layers - 1,), 0, at, widths["hidden"])
    return TapTable(tuple(blocks), canary, offset)


def find_fault(table: TapTable, rows: np.ndarray, embedding: np.ndarray | None) -> str | None:
    """Why these rows cannot be a sample's, or None.

    rows : (token, element), bfloat16 as uint16 bits, float16, or float32.
    embedding : (token, hidden), the same type: what enters block 0 for the token that the answer has there; None in
        a process that does not have the embedding.

    Every value must be finite, and `embed` must be the answer's token's embedding, bit for bit: rows of
    another token or another sample cannot pass.
    """
    finite = is_finite(rows[:, : table.stored])
    if not finite.all():
        element = int(np.argwhere(~finite)[0][1])
        block = next(b for b in table.blocks if b.offset <= element < b.end)
        layer = f" of layer {block.layers[(element - block.offset) // block.width]}" if block.layers else ""
        return f"{block.site}{layer} is not finite: the model overflowed, or a tap did not fire"
    if embedding is not None:
        bits = f"u{rows.itemsize}"
        block = table.embed
        if not np.array_equal(rows[:, block.offset : block.end].view(bits), embedding.view(bits)):
            return "a row holds another token's activation: its embed is not the embedding of the answer's token"
    return None


def is_finite(values: np.ndarray) -> np.ndarray:
    """Elementwise finiteness of float16, float32, or bfloat16 given as uint16 bits."""
    if values.dtype == np.uint16:
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)


def put_rows(views: Mapping[str, np.ndarray], blocks: Sequence[Block], rows: np.ndarray, place: tuple) -> None:
    """Copy packed rows to where they belong in a shard.

    views : site -> (layer, *axes, width), without layer where the site has none; the type of `rows`, or its bits.
    blocks : of the shard's sites and layers, as TapTable.part.  rows : (token, element).
    place : index into `axes` that selects as many cells as there are tokens: (positions, slot), or (tokens,).
    """
    if rows.dtype == np.float16:
        rows = rows.view(np.uint16)  # as shards hold it; else it would be rounded to whole numbers
    for block in blocks:
        values = rows[:, block.offset : block.end]
        columns = slice(block.column, block.column + block.width)
        if block.layers:
            layers = len(block.layers)
            target = views[block.site][block.first : block.first + layers, ..., columns]
            target[(slice(None), *place)] = values.reshape(len(rows), layers, block.width).transpose(1, 0, 2)
        else:
            views[block.site][..., columns][place] = values
