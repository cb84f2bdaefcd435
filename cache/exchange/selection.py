"""Selection: which activations of a capture are exported, and how they are read in blocks of bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.positions import Tokens, parse_positions
from hiddenlake.cache.sites import SITES, parse_layers
from hiddenlake.cache.store.coverage import DTYPES, EMBED
from hiddenlake.cache.store.moment import Dtype
from hiddenlake.cache.store.reader import Capture

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class Part:
    """All chosen samples' activations of one site and layer. layer : None for a site without layers."""

    site: str
    layer: int | None
    width: int

    @property
    def name(self) -> str:
        """`resid_post/layer_13`, or `embed/embed`: a path without its ending."""
        return part_name(self.site, self.layer)

    @property
    def column(self) -> str:
        """`resid_post_13`, or `embed`: the name of a column."""
        return self.site if self.layer is None else f"{self.site}_{self.layer}"


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """What is exported of a capture: parts x positions as cells, parts x tokens as tokens.

    positions, tokens : () and None where no cells, or no tokens, are exported.
    samples : the columns of samples/, in task order.
    lengths : (sample,) int64, stored tokens of each sample; 0 without tokens.
    dtype : as stored, e.g. `bfloat16`.
    """

    capture: Capture
    parts: tuple[Part, ...]
    positions: tuple[str, ...]
    tokens: Tokens | None
    samples: "pyarrow.Table"
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> str:
        return self.capture.coverage.dtype

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][0].itemsize

    @property
    def values(self) -> int:
        """Elements of all activations, cells and tokens."""
        rows = len(self) * len(self.positions) + int(self.lengths.sum())
        return rows * sum(part.width for part in self.parts)

    def cells(
        self, part: Part, rows: range, dtype: Dtype = "stored", positions: Sequence[str] | None = None
    ) -> np.ndarray:
        """(position, sample, width) of some rows in task order; NaN where the token is absent."""
        positions = self.positions if positions is None else positions
        return self.capture.read(part.site, part.layer, list(positions), rows, dtype)

    def token_blocks(self, part: Part, rows: range, limit: int, dtype: Dtype = "stored") -> Iterator[np.ndarray]:
        """(token, width) of some rows' tokens, one behind the other, at most about `limit` bytes at a time."""
        row_bytes = part.width * (4 if dtype == "float32" else self.itemsize)
        for start, stop in pack(self.lengths[rows.start : rows.stop] * row_bytes, limit):
            chosen = range(rows.start + start, rows.start + stop)
            most = max(1, limit // row_bytes)
            if len(chosen) > 1 or self.lengths[chosen.start] <= most:
                yield self.capture.read_tokens(part.site, part.layer, chosen, None, dtype).values
                continue
            # one sample that is longer than a block
            for token in range(0, int(self.lengths[chosen.start]), most):
                yield self.capture.read_tokens(part.site, part.layer, chosen, slice(token, token + most), dtype).values


def part_name(site: str, layer: int | str | None) -> str:
    """`resid_post/layer_13`, or `embed/embed` for a site without layers."""
    return f"{site}/layer_{layer}" if SITES[site].layered else f"{site}/{site}"


def pack(sizes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Consecutive runs (start, stop) whose sizes add up to at most `limit`; what is larger alone has one of its own."""
    ends = np.cumsum(sizes)
    runs, start = [], 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        runs.append((start, stop))
        start = stop
    return runs


def pack_even(count: int, size: int, limit: int) -> list[tuple[int, int]]:
    """`pack` for `count` things of one size."""
    step = max(1, limit // max(1, size))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def select(
    capture: Capture,
    sites: Iterable[str] | None = None,
    layers: str | Iterable[int] | None = None,
    positions: str | Iterable[str | int] | None = None,
) -> Selection:
    """What is to be exported. None means everything that is there, `embed` included.

    layers : `0,5,10-12`, or numbers.
    positions : names; the capture's token-level coverage (`all`, `all_generated/8`, ...) stands for its tokens.

    Raises UnknownNameError for what was not captured, naming what was, and BadInputError where nothing was.
    """
    c = capture.coverage
    if not len(capture):
        raise BadInputError(f"{capture.path} holds no samples yet: capture some before exporting them")
    known = [*c.sites, EMBED]
    chosen = known if sites is None else list(dict.fromkeys(site.strip() for site in sites))
    if unknown := [site for site in chosen if site not in known]:
        raise UnknownNameError(f"{capture.path} has no site {unknown[0]!r}: it has {', '.join(known)}")
    layered = any(SITES[site].layered for site in chosen)
    if layers is not None and not layered:
        raise UnknownNameError(f"the sites {', '.join(chosen)} have no layers, but layers {layers!r} were named")
    numbers = _layers(capture, layers) if layered else ()
    names, tokens = (c.positions, c.tokens) if positions is None else parse_positions(positions)
    if missing := [name for name in names if name not in c.positions]:
        raise UnknownNameError(
            f"{capture.path} has no position {missing[0]!r}: it has {', '.join(c.positions) or 'none'}"
            + (f", and the tokens {c.tokens}" if c.tokens else "")
        )
    if tokens is not None and tokens != c.tokens:
        raise UnknownNameError(f"{capture.path} does not hold the tokens {tokens}: it holds {c.tokens or 'none'}")
    parts = [
        Part(site, layer, c.widths[site]) for site in chosen for layer in (numbers if SITES[site].layered else (None,))
    ]
    samples = capture.samples()
    return Selection(capture, tuple(parts), names, tokens, samples, _lengths(capture, tokens, samples))


def _layers(capture: Capture, layers: str | Iterable[int] | None) -> tuple[int, ...]:
    there = capture.coverage.layers
    if layers is None or layers == "all":
        return there
    # counted from the end, the last captured layer could be taken for the model's last
    if isinstance(layers, str) and any(part.strip().startswith("-") for part in layers.split(",")):
        raise UnknownNameError(f"layers {layers!r}: name captured layers by their numbers from 0, e.g. {there[-1]}")
    numbers = [int(n) for n in layers] if not isinstance(layers, str) else parse_layers(layers, max(there) + 1)
    if missing := [n for n in numbers if n not in there]:
        raise UnknownNameError(f"{capture.path} has no layer {missing[0]}: it has {', '.join(map(str, there))}")
    return tuple(sorted(set(numbers)))


def _lengths(capture: Capture, tokens: Tokens | None, samples: "pyarrow.Table") -> np.ndarray:
    """(sample,) stored tokens. A complete sample's follow from its lengths; what else is there is asked for."""
    lengths = np.zeros(samples.num_rows, np.int64)
    if tokens is None:
        return lengths
    prompts, totals = (samples[name].to_numpy() for name in ("prompt_length", "total_length"))
    complete = np.array([status == "complete" for status in samples["status"].to_pylist()])
    lengths[:] = [len(tokens.indices(int(q), int(n))) for q, n in zip(prompts, totals, strict=True)]
    for row in np.flatnonzero(~complete).tolist():
        lengths[row] = capture.read_tokens(EMBED, None, [row]).lengths[0]
    return lengths
