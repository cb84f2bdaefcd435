"""Reading: activations by (site, layer, token) in blocks of bounded size, checked, as safetensors or as raw bytes."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from hiddenlake.cache.exchange.tensor_file import header
from hiddenlake.cache.exchange.values import NAMES
from hiddenlake.cache.service import wire
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.read_request import ReadRequest, check_size, missing, not_captured
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.blocks import blocks
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.extents import Extent, in_memory
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.snapshot import Snapshot, samples_of

# Read, checked and sent at once: large enough that what a block costs does not count, small beside what a server has.
BLOCK_BYTES = 8 << 20

# Values: in memory, or where the kernel finds them.
Block = memoryview | list[Extent]

_FORMAT_NAME = {own: name for name, own in NAMES.items()}
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer, planned: everything about it is known but the values.

    head : bytes in front of the values.
    shape, dtype : of the values, C order, little-endian.
    nbytes : of the whole answer.
    snapshot : names the moment of the capture that it is of.
    commits : names the commits that hold the samples, where these were named.
    blocks(files) : gives the values' bytes in their order, each block read and checked when it is asked for. What is not to
        be checked, and lies in memory as it is, is only named if `files`.
    at_hand() : all values, if they are only to be named, are one block, and lie in memory in files that are open; else None.
    """

    head: bytes
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    snapshot: str
    commits: str | None
    blocks: Callable[[bool], Iterator[Block]]
    at_hand: Callable[[], list[Extent] | None]


def plan_reading(capture: Capture, request: ReadRequest, most_bytes: int) -> Reading:
    """What a request will be answered with.

    Values are (layer, position, sample, width), or (layer, sample, token, width) for token indices, or (layer, token,
    width) for all tokens, and for indices of each sample; without layer for a site that has none. As safetensors they are `activations`, beside
    `token_index`: (position, sample), (sample, token) or (token,), with `offsets`, (sample + 1,), where values are (layer, token, width).

    Raises Problem: 413 for more than most_bytes, before memory is taken; 409 for what was not captured, and for rows of another
    snapshot.
    """
    snapshot = capture.snapshot
    if request.tokens is not None and request.positions is not None:
        raise Problem(422, "bad_input", "both `positions` and `tokens` are asked for", "name one of them")
    if request.snapshot not in (None, snapshot.name):
        raise Problem(
            409, wire.OTHER_SNAPSHOT, "the capture holds other samples than at the moment that this request is of",
            "ask for samples by their keys, or read the list of samples again", there={"snapshot": snapshot.name},
        )  # fmt: skip
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

        as_is = self.dtype == snapshot.coverage.dtype

        def named(outer: list[np.ndarray], part: np.ndarray, only_open: bool) -> list[Extent] | None:
            if not as_is or request.check:
                return None
            extents = snapshot.cell_extents(request.site, outer, part, only_open)
            return extents if extents is not None and in_memory(extents) else None

        def parts(files: bool) -> Iterator[Block]:
            for outer, part in blocks([*layers, chosen], rows, row_bytes, BLOCK_BYTES):
                extents = named(outer, part, only_open=False) if files else None
                if extents is not None:
                    yield extents
                else:
                    yield _bytes(snapshot.read_cells(request.site, outer, part, request.dtype, request.check))

        def at_hand() -> list[Extent] | None:
            if math.prod(shape) * _ITEM_BYTES[self.dtype] > BLOCK_BYTES:
                return None
            return named([*layers, chosen], rows, only_open=True)

        def tensors() -> dict[str, np.ndarray]:
            return {"token_index": snapshot.cell_tokens[np.ix_(chosen, rows)]}

        names = [snapshot.coverage.positions[i] for i in chosen]
        return self._reading(shape, parts, tensors, {"positions": names}, layers, rows, at_hand)

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

        def parts(files: bool) -> Iterator[Block]:
            for outer, part in blocks(layers, places, row_bytes, BLOCK_BYTES):
                yield _bytes(snapshot.read_tokens(request.site, outer, part, request.dtype, request.check))

        def tensors() -> dict[str, np.ndarray]:
            return {
                "offsets": np.cumsum([0, *lengths], dtype=np.int64),
                "token_index": snapshot.token_index[places],
            }

        return self._reading(shape, parts, tensors, {"tokens": "all"}, layers, rows)

    def some_tokens(self, tokens: Sequence[Any], most_bytes: int) -> Reading:
        """Each token of each sample, from wherever it is stored: as a position, or token by token."""
        snapshot = self.snapshot
        layers, rows = self._token_axes()
        ragged = bool(tokens) and isinstance(tokens[0], tuple)
        if ragged and len(tokens) != len(rows):
            raise Problem(
                422, "bad_input", f"there are {len(tokens)} lists of tokens for {len(rows)} samples",
                "give a list for each sample, or one for all",
            )  # fmt: skip
        counts = np.array([len(some) for some in tokens] if ragged else [len(tokens)] * len(rows), np.int64)
        axes = (int(counts.sum()),) if ragged else (len(rows), len(tokens))
        shape = (*map(len, layers), *axes, self.width)
        check_size(
            shape, _ITEM_BYTES[self.dtype], 4 * math.prod(axes) + 8 * len(rows) * ragged, len(rows), most_bytes
        )  # fmt: skip
        # One pair of sample and token behind the other.
        sample = np.repeat(np.arange(len(rows)), counts)
        owner = rows[sample]
        index = np.array(list(chain.from_iterable(tokens)), np.int64) if ragged else np.tile(tokens, len(rows))
        index = index.astype(np.int64)
        total = samples_of(snapshot, ["total_length"])["total_length"].to_numpy()
        index = np.where(index < 0, index + total[owner], index)
        place, position = self._where(owner, index)
        lacking = (place < 0) & (position < 0)
        if lacking.any():
            first = sample[np.argmax(lacking)]
            raise not_captured(
                snapshot,
                f"sample {snapshot.keys[rows[first]]}: {int(lacking[sample == first].sum())} of the {counts[first]} tokens "
                f"that were asked for were not captured",
                total_length=int(total[rows[first]]), token_index=self._stored(rows[first]),
            )  # fmt: skip
        row_bytes = self.width * _ITEM_BYTES[self.dtype]

        def parts(files: bool) -> Iterator[Block]:
            for outer, part in blocks(layers, np.arange(len(owner)), row_bytes, BLOCK_BYTES):
                yield _bytes(self._gather(outer, owner[part], place[part], position[part]))

        def tensors() -> dict[str, np.ndarray]:
            found = {"token_index": index.astype(np.int32).reshape(axes)}
            return found | {"offsets": np.cumsum([0, *counts], dtype=np.int64)} if ragged else found

        return self._reading(shape, parts, tensors, {"tokens": tokens}, layers, rows)

    def _token_axes(self) -> tuple[list[list[int]], np.ndarray]:
        """(indices along the layer axis, or nothing; rows), whether the capture has positions, tokens or both."""
        request = self.request
        samples = None if request.samples is None else list(request.samples)
        rows, _ = self.capture.rows(samples, self.snapshot)
        layers, _ = self.capture.layer_axis(self.snapshot, request.site, self.layers, request.dtype)
        return layers, rows

    def _where(self, rows: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pair,) row among all tokens, and number of a position, that hold each (sample, token); -1 where none does."""
        snapshot = self.snapshot
        place, position = np.full(index.shape, -1), np.full(index.shape, -1)
        if snapshot.coverage.positions:
            for number, at in enumerate(snapshot.cell_tokens):
                position = np.where((at[rows] == index) & (index >= 0), number, position)
        if (tokens := snapshot.coverage.tokens) is not None:
            number, rest = np.divmod(index - snapshot.token_first[rows], tokens.every)
            there = (rest == 0) & (number >= 0) & (number < snapshot.token_length[rows])
            place = np.where(there, snapshot.token_offsets[rows] + number, -1)
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
        """(layer, pair, width) of a block of (sample, token) pairs."""
        request, snapshot = self.request, self.snapshot
        by_token = place >= 0
        if len(rows) and by_token.all():
            return snapshot.read_tokens(request.site, outer, place, request.dtype, request.check)
        kind = np.float32 if request.dtype == "float32" else DTYPES[snapshot.coverage.dtype][1]
        result = np.empty((*map(len, outer), len(rows), self.width), kind)
        if by_token.any():
            result[..., by_token, :] = snapshot.read_tokens(
                request.site, outer, place[by_token], request.dtype, request.check
            )
        for number in np.unique(position[~by_token]).tolist():
            at = np.flatnonzero(~by_token & (position == number))
            result[..., at, :] = snapshot.read_cells(
                request.site, [*outer, [number]], rows[at], request.dtype, request.check, single=True
            )[..., 0, :, :]
        return result

    def _reading(
        self,
        shape: tuple[int, ...],
        parts: Callable[[bool], Iterator[Block]],
        tensors: Callable[[], dict[str, np.ndarray]],
        facts: dict[str, Any],
        layers: list[list[int]],
        rows: np.ndarray,
        at_hand: Callable[[], list[Extent] | None] = lambda: None,
    ) -> Reading:
        request, snapshot = self.request, self.snapshot
        values = math.prod(shape) * _ITEM_BYTES[self.dtype]
        head = b""
        if request.format == "safetensors":
            extra = {name: np.ascontiguousarray(array) for name, array in tensors().items()}
            kinds = {name: ({"i4": "I32", "i8": "I64"}[a.dtype.str[1:]], a.shape) for name, a in extra.items()}
            facts = facts | {
                "capture": request.capture,
                "snapshot": snapshot.name,
                "site": request.site,
                "layers": [snapshot.coverage.layers[i] for axis in layers for i in axis],
                "samples": snapshot.keys[rows].tolist(),
            }
            metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
            # Values last: they are what is streamed.
            head = header(kinds | {"activations": (_FORMAT_NAME[self.dtype], shape)}, metadata)
            head += b"".join(array.tobytes() for array in extra.values())
        commits = None if request.samples is None else snapshot.commits_name(rows)
        return Reading(head, shape, self.dtype, len(head) + values, snapshot.name, commits, parts, at_hand)


def _bytes(values: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
