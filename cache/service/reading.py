"""Reading: activations by (site, layer, token) in blocks of bounded size, checked, as safetensors or as raw bytes."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from hiddenlake.cache.exchange.tensor_file import header
from hiddenlake.cache.exchange.values import NAMES
from hiddenlake.cache.service.lake import snapshot_id
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.read_request import ReadRequest, check_size, missing, not_captured
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.snapshot import Snapshot, samples_of

# Read, checked and sent at once: large enough that what a block costs does not count, small beside what a server has.
BLOCK_BYTES = 8 << 20

_FORMAT_NAME = {own: name for name, own in NAMES.items()}
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer, planned: everything about it is known but the values.

    head : bytes in front of the values.
    shape, dtype : of the values, C order, little-endian.
    nbytes : of the whole answer.
    blocks : gives the values' bytes in their order, each block read and checked when it is asked for.
    """

    head: bytes
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    snapshot: str
    blocks: Callable[[], Iterator[memoryview]]


def plan_reading(capture: Capture, request: ReadRequest, most_bytes: int) -> Reading:
    """What a request will be answered with.

    Values are (layer, position, sample, width), or (layer, sample, token, width) for token indices, or (layer, token,
    width) for all tokens; without layer for a site that has none. As safetensors they are `activations`, beside
    `token_index`: (position, sample), (sample, token) or (token,), with `offsets`, (sample + 1,), for all tokens.

    Raises Problem: 413 for more than most_bytes, before memory is taken; 409 for what was not captured.
    """
    snapshot = capture.snapshot
    if request.tokens is not None and request.positions is not None:
        raise Problem(422, "bad_input", "both `positions` and `tokens` are asked for", "name one of them")
    if what := missing(request, snapshot):
        raise not_captured(snapshot, what)
    plan = _Plan(capture, snapshot, request)
    if request.tokens is None:
        return plan.cells(most_bytes)
    return plan.all_tokens(most_bytes) if request.tokens == "all" else plan.some_tokens(request.tokens, most_bytes)


class _Plan:
    def __init__(self, capture: Capture, snapshot: Snapshot, request: ReadRequest) -> None:
        self.capture, self.snapshot, self.request = capture, snapshot, request
        c = snapshot.coverage
        self.dtype = c.dtype if request.dtype == "stored" else "float32"
        self.width = c.widths.get(request.site, 0)
        layered = request.site in SITES and SITES[request.site].layered
        self.layers = None if request.layers is None or (not layered and not request.layers) else list(request.layers)

    def cells(self, most_bytes: int) -> Reading:
        request, snapshot = self.request, self.snapshot
        positions = None if request.positions is None else list(request.positions)
        samples = None if request.samples is None else list(request.samples)
        (layers, chosen, rows), _ = self.capture.axes(
            request.site, self.layers, positions, samples, request.dtype, snapshot
        )
        shape = (*map(len, layers), len(chosen), len(rows), self.width)
        check_size(shape, _ITEM_BYTES[self.dtype], 4 * len(chosen) * len(rows), len(rows), most_bytes)
        row_bytes = self.width * _ITEM_BYTES[self.dtype]

        def blocks() -> Iterator[memoryview]:
            for outer, part in _blocks([*layers, chosen], rows, row_bytes):
                yield _bytes(snapshot.read_cells(request.site, outer, part, request.dtype, request.check))

        def tensors() -> dict[str, np.ndarray]:
            return {"token_index": snapshot.cell_tokens[np.ix_(chosen, rows)]}

        names = [snapshot.coverage.positions[i] for i in chosen]
        return self._reading(shape, blocks, tensors, {"positions": names}, layers, rows)

    def all_tokens(self, most_bytes: int) -> Reading:
        request, snapshot = self.request, self.snapshot
        layers, rows = self._token_axes()
        lengths = snapshot.token_length[rows]
        count = int(lengths.sum())
        shape = (*map(len, layers), count, self.width)
        check_size(shape, _ITEM_BYTES[self.dtype], 4 * count + 8 * len(rows), len(rows), most_bytes)
        starts = snapshot.token_offsets[rows]
        places = np.concatenate(
            [np.empty(0, np.int64), *(s + np.arange(n) for s, n in zip(starts, lengths, strict=True))]
        )
        row_bytes = self.width * _ITEM_BYTES[self.dtype]

        def blocks() -> Iterator[memoryview]:
            for outer, part in _blocks(layers, places, row_bytes):
                yield _bytes(snapshot.read_tokens(request.site, outer, part, request.dtype, request.check))

        def tensors() -> dict[str, np.ndarray]:
            return {
                "offsets": np.cumsum([0, *lengths], dtype=np.int64),
                "token_index": snapshot.token_index[places],
            }

        return self._reading(shape, blocks, tensors, {"tokens": "all"}, layers, rows)

    def some_tokens(self, tokens: Sequence[int], most_bytes: int) -> Reading:
        """Each token of each sample, from wherever it is stored: as a position, or token by token."""
        snapshot = self.snapshot
        layers, rows = self._token_axes()
        shape = (*map(len, layers), len(rows), len(tokens), self.width)
        check_size(shape, _ITEM_BYTES[self.dtype], 4 * len(rows) * len(tokens), len(rows), most_bytes)
        table = samples_of(snapshot, ["total_length"])
        total = table["total_length"].to_numpy()[rows]
        wanted = np.array(tokens, np.int64)[None, :] + np.where(np.array(tokens) < 0, 1, 0)[None, :] * total[:, None]
        place, position = self._where(rows, wanted)
        missing = (place < 0) & (position < 0)
        if missing.any():
            first = int(np.flatnonzero(missing.any(axis=1))[0])
            raise not_captured(
                snapshot,
                f"sample {snapshot.keys[rows[first]]}: {int(missing[first].sum())} of the {len(tokens)} tokens that were asked "
                f"for were not captured",
                total_length=int(total[first]), token_index=self._stored(rows[first]),
            )  # fmt: skip
        row_bytes = self.width * _ITEM_BYTES[self.dtype]

        def blocks() -> Iterator[memoryview]:
            at_once = np.arange(len(rows))
            for outer, part in _blocks(layers, at_once, row_bytes * len(tokens)):
                yield _bytes(self._gather(outer, rows[part], place[part], position[part]))

        def tensors() -> dict[str, np.ndarray]:
            return {"token_index": wanted.astype(np.int32)}

        return self._reading(shape, blocks, tensors, {"tokens": list(tokens)}, layers, rows)

    def _token_axes(self) -> tuple[list[list[int]], np.ndarray]:
        """(indices along the layer axis, or nothing; rows), whether the capture has positions, tokens or both."""
        request = self.request
        samples = None if request.samples is None else list(request.samples)
        rows, _ = self.capture.rows(samples, self.snapshot)
        layers, _ = self.capture.layer_axis(self.snapshot, request.site, self.layers, request.dtype)
        return layers, rows

    def _where(self, rows: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sample, token) row among all tokens, and number of a position, that hold each; -1 where none does."""
        snapshot = self.snapshot
        place, position = np.full(wanted.shape, -1), np.full(wanted.shape, -1)
        if snapshot.coverage.positions:
            for number, at in enumerate(snapshot.cell_tokens[:, rows]):
                position = np.where((at[:, None] == wanted) & (wanted >= 0), number, position)
        if snapshot.coverage.tokens is not None:
            for i, row in enumerate(rows.tolist()):
                start = int(snapshot.token_offsets[row])
                stored = snapshot.token_index[start : start + int(snapshot.token_length[row])]
                at = np.searchsorted(stored, wanted[i])
                found = (
                    (at < len(stored)) & (stored[np.minimum(at, len(stored) - 1)] == wanted[i])
                    if len(stored)
                    else False
                )
                place[i] = np.where(found, start + at, -1)
        return place, position

    def _stored(self, row: int) -> list[int]:
        """Token indices of which a sample has an activation."""
        snapshot = self.snapshot
        found: set[int] = set()
        if snapshot.coverage.positions:
            found |= {token for token in snapshot.cell_tokens[:, row].tolist() if token >= 0}
        if snapshot.coverage.tokens is not None:
            start = int(snapshot.token_offsets[row])
            found |= set(snapshot.token_index[start : start + int(snapshot.token_length[row])].tolist())
        return list(islice(sorted(found), 1000))

    def _gather(self, outer: list[np.ndarray], rows: np.ndarray, place: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(layer, sample, token, width) of a block."""
        request, snapshot = self.request, self.snapshot
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        by_token = place >= 0
        if by_token.any():
            values = snapshot.read_tokens(request.site, outer, place[by_token], request.dtype, request.check)
            parts.append((*np.nonzero(by_token), values))
        for number in np.unique(position[~by_token]).tolist():
            sample, token = np.nonzero(~by_token & (position == number))
            values = snapshot.read_cells(
                request.site, [*outer, [number]], rows[sample], request.dtype, request.check, single=True
            )
            parts.append((sample, token, values[..., 0, :, :]))
        result = np.empty((*map(len, outer), *place.shape, self.width), parts[0][2].dtype) if parts else np.empty(0)
        for sample, token, values in parts:
            result[..., sample, token, :] = values
        return result

    def _reading(
        self,
        shape: tuple[int, ...],
        blocks: Callable[[], Iterator[memoryview]],
        tensors: Callable[[], dict[str, np.ndarray]],
        facts: dict[str, Any],
        layers: list[list[int]],
        rows: np.ndarray,
    ) -> Reading:
        request, snapshot = self.request, self.snapshot
        values = math.prod(shape) * _ITEM_BYTES[self.dtype]
        named = snapshot_id(snapshot)
        head = b""
        if request.format == "safetensors":
            extra = {name: np.ascontiguousarray(array) for name, array in tensors().items()}
            kinds = {name: ({"i4": "I32", "i8": "I64"}[a.dtype.str[1:]], a.shape) for name, a in extra.items()}
            facts = facts | {
                "capture": request.capture,
                "snapshot": named,
                "site": request.site,
                "layers": [snapshot.coverage.layers[i] for axis in layers for i in axis],
                "samples": snapshot.keys[rows].tolist(),
            }
            metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
            # Values last: they are what is streamed.
            head = header(kinds | {"activations": (_FORMAT_NAME[self.dtype], shape)}, metadata)
            head += b"".join(array.tobytes() for array in extra.values())
        return Reading(head, shape, self.dtype, len(head) + values, named, blocks)


def _blocks(
    outer: Sequence[Sequence[int]], rows: np.ndarray, row_bytes: int
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Parts of a C-ordered block (*outer, row), one behind the other, none of more than BLOCK_BYTES but for one row."""
    if not outer:
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, len(rows), step):
            yield [], rows[start : start + step]
        return
    first, *rest = [np.asarray(axis, np.int64) for axis in outer]
    inner = row_bytes * len(rows) * int(np.prod([len(axis) for axis in rest], dtype=np.int64))
    if inner <= BLOCK_BYTES:
        step = max(1, BLOCK_BYTES // max(1, inner))
        for start in range(0, len(first), step):
            yield [first[start : start + step], *rest], rows
        return
    for index in first:
        for others, part in _blocks(rest, rows, row_bytes):
            yield [np.array([index]), *others], part


def _bytes(values: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
