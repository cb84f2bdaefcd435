"""Rows: the taps' order, and the checks that a sample's rows pass before they are stored. Pure NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TapTable:
    """Which tap is which row of a tap buffer.

    The order is site by site, layers ascending, so that one site's rows are contiguous. `embed` follows. The
    stream leaving the last layer comes last: the canary reads it, and it is stored only if asked for.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """(site, layer) of each tap; `embed` has layer 0."""
        return (
            *((site, layer) for site in self.sites for layer in self.layers),
            ("embed", 0),
            ("resid_post", self.n_layers - 1),
        )

    def __len__(self) -> int:
        return len(self.sites) * len(self.layers) + 2

    def of_site(self, site: str) -> slice:
        """The rows of the buffer that hold a site, layers ascending."""
        if site == "embed":
            return slice(len(self) - 2, len(self) - 1)
        first = self.sites.index(site) * len(self.layers)
        return slice(first, first + len(self.layers))


def find_fault(table: TapTable, rows: np.ndarray, embedding: np.ndarray) -> str | None:
    """Why these rows cannot be a sample's, or None.

    rows : (tap, token, hidden), bfloat16 as uint16 bits, or float32.
    embedding : (token, hidden), the same type: the embedding of each token that the answer has there.

    Every value must be finite, and `embed` must be the answer's token's embedding, bit for bit: rows of
    another token or another sample cannot pass.
    """
    finite = is_finite(rows[: len(table) - 1])
    if not finite.all():
        site, layer = table.pairs[int(np.argwhere(~finite)[0][0])]
        return f"{site} of layer {layer} is not finite: the model overflowed, or a tap did not fire"
    bits = f"u{rows.itemsize}"
    if not np.array_equal(rows[table.of_site("embed")][0].view(bits), embedding.view(bits)):
        return "a row holds another token's activation: its embed is not the embedding of the answer's token"
    return None


def is_finite(values: np.ndarray) -> np.ndarray:
    """Elementwise finiteness of float32, or of bfloat16 given as uint16 bits."""
    if values.dtype == np.uint16:
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)


def put_rows(
    views: Mapping[str, np.ndarray], table: TapTable, rows: np.ndarray, columns: Sequence[int], slot: int
) -> None:
    """Copy a sample's rows into its slot of a shard.

    views : per array (layer, position, slot, hidden), `embed` without layer; the type of `rows`.
    rows : (tap, token, hidden), one token a column.
    columns : positions that are present; the others keep the NaN that the shard was filled with.
    """
    columns = list(columns)
    for site, view in views.items():
        block = rows[table.of_site(site)]
        if site == "embed":
            view[columns, slot] = block[0]
        else:
            view[:, columns, slot] = block
