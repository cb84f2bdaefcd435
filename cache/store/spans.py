"""Spans: the place of each sample's tokens on the token axis, and the token shards that a writer fills."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.layout import BUFFERS, Layout
from hiddenlake.cache.store.shard import TokenBuffer, TokenShard


@dataclass(eq=False, slots=True)
class TokenSpan:
    """The place of one sample's tokens, reserved for it: rows `start` to `start + length` of the token axis.

    handed, filled : how many rows were handed out in pieces, and how many of them are there.
    """

    start: int
    length: int
    handed: int = 0
    filled: int = 0

    @property
    def rest(self) -> int:
        """Rows that are not handed out yet."""
        return self.length - self.handed


@dataclass(frozen=True, eq=False, slots=True)
class TokenPiece:
    """The part of a span that lies in one token shard.

    row : its first row in the shard.  count : how many rows.  first : number of the first row in the span.
    """

    span: TokenSpan
    shard: TokenShard
    row: int
    count: int
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


@dataclass(eq=False, slots=True)
class _Filling:
    """A claimed token shard until it is published.

    reserved, settled : rows that belong to spans, and how many of them are filled or given up.
    open : whether more rows may be reserved.
    kept : pieces that are filled.
    """

    number: int
    fencing: int
    shard: TokenShard | None = None
    reserved: int = 0
    settled: int = 0
    open: bool = True
    kept: list[TokenPiece] = field(default_factory=list)


class Spans:
    """The token side of a writer. Its methods are called under the writer's lock, but for `piece` and `filled`.

    claim : (first, shards) -> shard -> fencing number; empty when `first` is given and they are not free.
    publish : writes a token shard in the background, given the rows that are kept.
    check : raises what went wrong in the background.
    shared : whether other processes fill its shards.
    """

    def __init__(
        self,
        layout: Layout,
        lock: threading.RLock,
        claim: Callable[[int | None, int], dict[int, int]],
        publish: Callable[[TokenShard, list[slice]], Future[None]],
        check: Callable[[], None],
        shared: bool,
    ) -> None:
        self._layout, self._lock, self._shared = layout, lock, shared
        self._claim, self._publish, self._check = claim, publish, check
        self._open: set[TokenSpan] = set()
        self._filling: list[_Filling] = []
        self._buffers: list[TokenBuffer] = []
        self._idle: list[TokenBuffer] = []
        self._publishing: list[Future[None]] = []

    @property
    def open(self) -> int:
        """Spans that are neither added nor released."""
        return len(self._open)

    def reserve(self, length: int) -> TokenSpan:
        """A span of `length` tokens, in shards that are all this writer's own."""
        if length < 0:
            raise ValueError(f"a span of {length} tokens: expected 0 or more")
        span = TokenSpan(-1, 0)
        if length:
            span = TokenSpan(self._start(length), length)
            for filling in self._filling:
                filling.reserved += self._overlap(span, filling)
                filling.open &= filling.reserved < self._layout.shard_tokens
        self._open.add(span)
        return span

    def _start(self, length: int) -> int:
        """Claim what a span of `length` tokens needs. Returns its first row on the token axis."""
        K = self._layout.shard_tokens
        last = self._filling[-1] if self._filling and self._filling[-1].open else None
        row = last.reserved if last else K
        claimed = {}
        if length > K - row:
            claimed = self._claim(last and last.number + 1, -(-(length - (K - row)) // K))
            if not claimed:
                # Another writer has the next shard: the rest of this one stays a hole.
                self.close_shard()
                last, row = None, K
                claimed = self._claim(None, -(-length // K))
            self._filling += [_Filling(number, fencing) for number, fencing in claimed.items()]
        return last.number * K + row if last else min(claimed) * K

    def _overlap(self, span: TokenSpan, filling: _Filling) -> int:
        K = self._layout.shard_tokens
        first, stop = filling.number * K, (filling.number + 1) * K
        return max(0, min(span.start + span.length, stop) - max(span.start, first))

    def piece(self, span: TokenSpan) -> TokenPiece | None:
        """The next piece of a span, whose rows are to be written; None when others must be filled first."""
        while True:
            with self._lock:
                self._check()
                self._check_open(span)
                if not span.rest:
                    raise ValueError("all rows of the span were handed out: ask while `span.rest`")
                number, row = divmod(span.start + span.handed, self._layout.shard_tokens)
                shard = self._shard(number)
                if shard is not None:
                    piece = TokenPiece(span, shard, row, min(span.rest, self._layout.shard_tokens - row), span.handed)
                    shard.buffer.clear(piece.rows)
                    span.handed += piece.count
                    return piece
                publishing = self._publishing = [future for future in self._publishing if not future.done()]
            if not publishing:
                return None
            wait(publishing, return_when=FIRST_COMPLETED)

    def _shard(self, number: int) -> TokenShard | None:
        """A shard with its buffer, or None while there is none for it.

        Shards get buffers in their order, so that the first of them can always be finished.
        """
        for filling in self._filling:
            if filling.shard is None:
                if not self._idle:
                    if len(self._buffers) == BUFFERS:
                        return None
                    self._buffers.append(TokenBuffer(self._layout, self._shared))
                    self._idle.append(self._buffers[-1])
                filling.shard = TokenShard(filling.number, filling.fencing, self._idle.pop())
            if filling.number == number:
                return filling.shard
        raise AssertionError(f"token shard {number} is not being filled")

    def filled(self, piece: TokenPiece) -> None:
        """A piece's rows are there. Raises CaptureError where a value is not finite."""
        with self._lock:
            self._check()
            self._filling_of(piece)
        piece.shard.buffer.finish(piece.rows)
        with self._lock:
            filling = self._filling_of(piece)
            piece.span.filled += piece.count
            filling.settled += piece.count
            filling.kept.append(piece)
            self._publish_if_settled(filling)

    def _filling_of(self, piece: TokenPiece) -> _Filling:
        self._check_open(piece.span)
        for filling in self._filling:
            if filling.shard is piece.shard and piece not in filling.kept:
                return filling
        raise StoreError("the piece was filled before: call `filled` once for each")

    def check_filled(self, span: TokenSpan) -> None:
        """Raise StoreError unless a span is open and all its rows are there."""
        self._check_open(span)
        if span.filled < span.length:
            raise StoreError(f"{span.filled} of the span's {span.length} rows are filled: fill all, or release it")

    def _check_open(self, span: TokenSpan) -> None:
        if span not in self._open:
            raise StoreError("the span is not handed out: pass what `span()` returned, before it is added or released")

    def add(self, span: TokenSpan) -> None:
        """A span's sample was added: its rows stay."""
        self._open.remove(span)

    def release(self, span: TokenSpan) -> None:
        """Give a span up. What of it is not published becomes a hole."""
        self._check_open(span)
        self._open.remove(span)
        for filling in list(self._filling):
            if overlap := self._overlap(span, filling):
                filling.settled += overlap - sum(piece.count for piece in filling.kept if piece.span is span)
                filling.kept = [piece for piece in filling.kept if piece.span is not span]
                self._publish_if_settled(filling)

    def release_all(self) -> None:
        for span in list(self._open):
            self.release(span)

    def close_shard(self) -> None:
        """Reserve no more of the shard that is being filled: its rest stays a hole."""
        if self._filling and self._filling[-1].open:
            self._filling[-1].open = False
            self._publish_if_settled(self._filling[-1])

    def _publish_if_settled(self, filling: _Filling) -> None:
        if filling.open or filling.settled < filling.reserved:
            return
        self._filling.remove(filling)
        if filling.kept:
            future = self._publish(filling.shard, [piece.rows for piece in filling.kept])
            self._publishing.append(future)
        elif filling.shard is not None:
            self._idle.append(filling.shard.buffer)

    def recycle(self, buffer: TokenBuffer) -> None:
        """A published shard's buffer may be filled again."""
        self._idle.append(buffer)

    def close(self) -> None:
        """Free the buffers."""
        for buffer in self._buffers:
            buffer.close()
