"""Shelf: finished samples on their way from an engine's memory into the shards of one capture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.placing import Placed
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store.shard import Shard, TokenShard
from hiddenlake.cache.store.spans import TokenPiece, TokenSpan
from hiddenlake.cache.store.writer import Writer
from hiddenlake.cache.worker.plan import Piece, Placement

# key, and None or why it cannot be stored
Stored = tuple[str, str | None]

# A sample that is added to the capture, or that cannot be, and why.
Settled = tuple[Sample, Placed, str | None]


class Storing(Protocol):
    """What a shelf needs of an engine: see Engine."""

    def store(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> list[Stored]: ...

    def stored(self, wait: bool) -> list[Stored]: ...


class Shelf:
    """One engine and one writer. len : samples that are being stored; keys : theirs."""

    def __init__(self, engine: Storing, writer: Writer) -> None:
        self.engine, self.writer = engine, writer
        self._items: dict[str, _Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def keys(self) -> set[str]:
        return set(self._items)

    def place(self, finished: Sequence[tuple[Sample, Placed]]) -> list[Settled]:
        """Give samples their places, and start to store them. Returns what was settled meanwhile."""
        settled: list[Settled] = []
        most = self.writer.shard_samples
        for start in range(0, len(finished), most):
            block = finished[start : start + most]
            # never more than a shard's worth at once: two shards are open at most
            if len(self) + len(block) > most:
                settled += self.wait()
            settled += self._place(block)
        return settled

    def wait(self) -> list[Settled]:
        """Until all is settled that was placed."""
        return self.settle(self.engine.stored(wait=True))

    def settle(self, stored: Sequence[Stored]) -> list[Settled]:
        """Add what the engine has stored; give the place back of what it could not store."""
        settled: list[Settled] = []
        for key, cause in stored:
            item = self._items[key]
            if cause is None:
                try:
                    self._accept(item)
                except CaptureError as error:  # memory that changed between the worker's check and this one
                    cause = str(error)
            if cause is None and not item.done:
                continue
            del self._items[key]
            if cause is not None:
                self.writer.release(item.shard, item.slot, item.span)
            settled.append((item.sample, item.placed, cause))
        return settled

    def _place(self, finished: Sequence[tuple[Sample, Placed]]) -> list[Settled]:
        settled: list[Settled] = []
        batch = _Batch()
        for sample, placed in finished:
            shard, slot = self.writer.slot()
            span = self.writer.span(len(placed.tokens)) if self.writer.coverage.tokens else None
            item = self._items[sample.key] = _Item(sample, placed, shard, slot, span)
            batch.add(item, self._pieces(item), cells=True)
            while not item.done:
                # no buffer is left for the rest of this sample's tokens: fill those that are held first
                settled += self.settle(self.engine.store(batch.handles, batch.placements))
                settled += self.wait()
                batch = _Batch()
                if sample.key not in self._items:
                    break
                batch.add(item, self._pieces(item), cells=False)
        return settled + self.settle(self.engine.store(batch.handles, batch.placements))

    def _pieces(self, item: "_Item") -> list[TokenPiece]:
        """Places for the sample's next tokens, as many as the token buffers take."""
        pieces = []
        while item.span is not None and item.span.rest and (piece := self.writer.piece(item.span)) is not None:
            pieces.append(piece)
        return pieces

    def _accept(self, item: "_Item") -> None:
        """What was placed is there. Raises CaptureError where it is not."""
        for piece in item.pieces:
            self.writer.filled(piece)
        item.pieces = []
        if item.done:
            self.writer.add(item.shard, item.slot, item.sample, item.span)


@dataclass(slots=True)
class _Item:
    """pieces : places of tokens that were sent and not yet confirmed."""

    sample: Sample
    placed: Placed
    shard: Shard
    slot: int
    span: TokenSpan | None
    pieces: list[TokenPiece] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all of its tokens have a place."""
        return self.span is None or not self.span.rest


class _Batch:
    """Placements of one call to the engine, and the handles of the shards that they name."""

    def __init__(self) -> None:
        self.handles: list[dict[str, Any]] = []
        self.placements: list[Placement] = []
        self._number: dict[int, int] = {}

    def add(self, item: _Item, pieces: Sequence[TokenPiece], cells: bool) -> None:
        """Place a sample's cells, if asked for, and the pieces of its tokens."""
        item.pieces = [*pieces]
        tokens = item.placed.tokens
        placed = []
        for piece in pieces:
            part = tokens[piece.first : piece.first + piece.count]
            placed.append(Piece(self._handle(piece.shard), piece.row, (part.start, part.stop, part.step)))
        cells = cells and bool(item.sample.token_index)
        handle = self._handle(item.shard) if cells else None
        self.placements.append(item.placed.placement(item.sample, handle, item.slot, placed, item.done))

    def _handle(self, shard: Shard | TokenShard) -> int:
        if id(shard) not in self._number:
            self._number[id(shard)] = len(self.handles)
            self.handles.append(shard.handle)
        return self._number[id(shard)]
