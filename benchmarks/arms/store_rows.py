"""Synthetic activations for stores: every sample's rows can be told again, and making them costs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Distinct values before they repeat, 8 MiB: far more than a chunk, so that nothing compresses to nothing.
_SPAN = 1 << 22

# Samples start on cache lines, at places that repeat after _SPAN / _STEP samples.
_STEP = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one store's activations. samples : N.  shard : B, samples a shard, for stores that have shards."""

    layers: int
    positions: int
    samples: int
    hidden: int
    shard: int

    @property
    def bytes(self) -> int:
        """Of the activations of all samples, bfloat16."""
        return self.layers * self.positions * self.samples * self.hidden * 2


@dataclass(frozen=True, slots=True)
class Want:
    """What one read asks for.

    layers, positions, samples : indices, ascending.  at : in [0, 1), where to read in what has no cells.
    """

    layers: range
    positions: range
    samples: Sequence[int]
    at: float

    @classmethod
    def of(cls, want: dict[str, Any], shape: Shape) -> "Want":
        """From JSON: [first, stop] of layers and positions, None for all; samples None for all, or indices."""
        layers, positions = want["layers"] or [0, shape.layers], want["positions"] or [0, shape.positions]
        samples = range(shape.samples) if want["samples"] is None else want["samples"]
        return cls(range(*layers), range(*positions), samples, want["at"])

    def bytes(self, shape: Shape) -> int:
        return len(self.layers) * len(self.positions) * len(self.samples) * shape.hidden * 2

    @property
    def index(self) -> tuple[Any, Any, Any]:
        """(layer, position, sample) as NumPy's users write it: a number, a slice, or indices."""
        return _index(self.layers), _index(self.positions), _index(self.samples)


def _index(values: Sequence[int]) -> Any:
    if len(values) == 1:
        return values[0]
    return slice(values.start, values.stop) if isinstance(values, range) else np.asarray(values)


class Rows:
    """Rows of each sample, as an engine hands them over: (layer, position, hidden), bits of bfloat16, in memory."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._size = shape.layers * shape.positions * shape.hidden
        values = np.random.default_rng(0).standard_normal(_SPAN, dtype=np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        self._bits = np.resize(bits, _SPAN + self._size)

    def _start(self, sample: int) -> int:
        # an odd factor reaches every place before it repeats one
        return _STEP * (sample * 40_503 % (_SPAN // _STEP))

    def sample(self, i: int) -> np.ndarray:
        """(layer, position, hidden) uint16. Not to be written to."""
        start, s = self._start(i), self.shape
        return self._bits[start : start + self._size].reshape(s.layers, s.positions, s.hidden)

    def blocks(self) -> list[range]:
        """Samples of each shard."""
        N, B = self.shape.samples, self.shape.shard
        return [range(start, min(N, start + B)) for start in range(0, N, B)]

    def what_is_wrong(self, want: Want, found: np.ndarray) -> str | None:
        """What differs in what was read, in a random part of its rows.

        found : (layer, position, sample, hidden) uint16, over those of `want`.
        """
        shape = (len(want.layers), len(want.positions), len(want.samples), self.shape.hidden)
        if found.shape != shape or found.dtype != np.uint16:
            return f"read {found.shape} {found.dtype}, expected {shape} uint16"
        random = np.random.default_rng(int(want.at * 2**32))
        for _ in range(256):
            l, p, n = (int(random.integers(size)) for size in shape[:3])
            expected = self.sample(want.samples[n])[want.layers[l], want.positions[p]]
            if not np.array_equal(found[l, p, n], expected):
                return f"layer {want.layers[l]}, position {want.positions[p]}, sample {want.samples[n]} is another row"
        return None
