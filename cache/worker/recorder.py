"""Recorder: which row belongs to which token of which sample, from the first prefill to the shard."""

import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hiddenlake.cache.pools import Check, PromptPool, blocks
from hiddenlake.cache.positions import Wanted, parse_positions, wanted
from hiddenlake.cache.worker.bits import as_bits
from hiddenlake.cache.worker.plan import (
    CANARY,
    KEY_ARG,
    POSITIONS_ARG,
    PROMPT_LENGTH_ARG,
    TAIL_ARG,
    TOKENS_ARG,
    Plan,
)  # fmt: skip
from hiddenlake.cache.worker.ring import Ring
from hiddenlake.cache.worker.spill import Spill


@dataclass(slots=True)
class Book:
    """What is kept of one sample.

    slots : token index -> slot of the ring; below zero, -1 - n is number n in the spill. Written by absolute position,
        so a token that is computed again (preemption, rejected drafts) lands where it was.
    tokens : token indices to keep, ascending; None for what `want` says.
    end : no token from here on is kept.
    requests : vLLM's ids of those that compute it.
    storing : from when the driver has said where the rows go, nothing is added any more.
    cause : why the sample cannot be stored, once something went wrong.
    lock : held while rows are read, moved or freed: a thread of its own reads them.
    """

    prompt_length: int
    want: Wanted
    tokens: Sequence[int] | None
    end: int
    slots: dict[int, int] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)
    pool: PromptPool | None = None
    storing: bool = False
    cause: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kept(self, start: int, stop: int) -> Iterable[int]:
        """Those of the tokens start .. stop-1 that are kept, ascending."""
        if self.tokens is not None:
            return _between(self.tokens, start, stop)
        q, want, stop = self.prompt_length, self.want, min(stop, self.end)
        prompt = _between(want.prompt, start, min(stop, q)) if start < q else ()
        if stop <= q:
            return prompt
        first = max(start, q)
        if want.answer is None:
            answer = range(first, stop)
        else:
            answer = [q + offset for offset in _between(want.answer, first - q, stop - q)]
        return [*prompt, *answer] if prompt else answer


def _between(ascending: Sequence[int], start: int, stop: int) -> Sequence[int]:
    return ascending[bisect_left(ascending, start) : bisect_left(ascending, stop)]


class Recorder:
    """Follows the batches of one model runner and keeps the rows that its samples may need.

    rows_of : the row map of the runner: a batch to (request id, first row, first token, number of tokens) of each
        request in it.
    check : says why rows cannot be those of some token ids at some tokens, or None.
    bits : (slot, element) of the ring, as stored bits.
    """

    def __init__(
        self,
        plan: Plan,
        staging: Any,
        rows_of: Callable[..., Iterable[tuple[str, int, int, int]]],
        check: Check,
    ) -> None:
        self.plan = plan
        self.staging = staging
        self.rows_of = rows_of
        self.check = check
        self.books: dict[str, Book] = {}
        self.recomputed = 0
        self.spilled = 0
        self.bits = as_bits(staging.ring.arena)
        self.spill = Spill(plan.spill, self.bits.shape[1], self.bits.dtype) if plan.spill is not None else None
        self._book_of: dict[str, tuple[Book, int]] = {}
        self._active = False

    @property
    def ring(self) -> Ring:
        return self.staging.ring

    # Called around the runner's forward pass. An error here must not kill the generation, and must not be
    # silent either: every sample in flight fails with it.

    def before_forward(self, scheduler_output: Any, *batch: Any) -> None:
        try:
            self._open_books(scheduler_output)
            if self._book_of:
                self._active = True
                self.staging.begin(*self._map(self.rows_of(scheduler_output, *batch)))
            elif self._active:  # ordinary requests only: the taps are told once
                self._idle()
        except Exception:  # noqa: BLE001 - reported as the cause of every sample in flight
            self._fail_all(traceback.format_exc(limit=3))
            self._idle()

    def _idle(self) -> None:
        """Nothing is wanted of the next steps: what was wanted of the last one means other rows by then."""
        self.staging.begin([], np.empty(0, np.int64))
        self._active = False

    def after_forward(self) -> None:
        if not self._active:
            return
        try:
            self.staging.collect()
            self._pool()
        except Exception:  # noqa: BLE001 - reported as the cause of every sample in flight
            self._fail_all(traceback.format_exc(limit=3))

    def _fail_all(self, cause: str) -> None:
        for book in self.books.values():
            book.cause = book.cause or f"capture failed in the worker: {cause}"

    def _map(self, batch: Iterable[tuple[str, int, int, int]]) -> tuple[list[int], np.ndarray]:
        """(rows of the batch, slots of the ring) of the tokens to keep in this step.

        On a GPU the model may wait for this, so that what is done for each request of a decoding batch counts.
        """
        rows: list[int] = []
        books: list[Book] = []
        tokens: list[int] = []
        for request_id, first, start, n in batch:
            found = self._book_of.get(request_id)
            if found is None:
                continue
            book, only = found
            if book.storing or book.cause is not None:
                continue
            kept = book.kept(start, start + n)
            if only >= 0:
                kept = (only,) if start <= only < start + n else ()
            elif book.pool is not None and start < book.prompt_length:
                # the whole prompt passes by the pools, also where no single token of it is kept
                passing = range(max(start, book.pool.count), min(start + n, book.prompt_length))
                kept = sorted({*kept, *passing})
            for token in kept:
                rows.append(first - start + token)
                books.append(book)
                tokens.append(token)
        if len(rows) > self.ring.free:
            self._make_room(len(rows))
        slots: list[int] = []
        new: list[int] = []
        for i, (book, token) in enumerate(zip(books, tokens, strict=True)):
            slot = book.slots.get(token)
            if slot is None:
                new.append(i)
                slot = -1
            else:
                self.recomputed += 1
                if slot < 0:  # it was spilled, and is computed again
                    self.spill.free([-1 - book.slots.pop(token)])
                    new.append(i)
            slots.append(slot)
        taken = self.ring.take(len(new))
        if taken is None:
            for book in books:
                book.cause = f"the ring was full: it has {len(self.bits)} rows"
            return [], np.empty(0, np.int64)
        for i, slot in zip(new, taken.tolist(), strict=True):
            books[i].slots[tokens[i]] = slot
        if len(new) == len(slots):
            return rows, taken
        chosen = np.array(slots, np.int64)
        chosen[new] = taken
        return rows, chosen

    def _make_room(self, n: int) -> None:
        """Spill the oldest samples' rows, so that a step finds n free slots."""
        if self.spill is None:
            return
        self.staging.wait(self.staging.mark())
        for book in self.books.values():
            if self.ring.free >= n:
                return
            with book.lock:
                held = [(token, slot) for token, slot in book.slots.items() if slot >= 0]
                slots = [slot for _, slot in held]
                numbers = self.spill.write(self.bits[slots])
                book.slots.update((token, -1 - number) for (token, _), number in zip(held, numbers, strict=True))
                self.ring.give_back(slots)
            self.spilled += len(slots)

    def _pool(self) -> None:
        """Add the prompt rows of this step to the means and maxima of their samples, and free those not kept."""
        pooling = [book for book in self.books.values() if book.pool is not None and not book.pool.complete]
        if not pooling:
            return
        self.staging.wait(self.staging.mark())
        for book in pooling:
            fresh = {t: s for t, s in book.slots.items() if book.pool.count <= t < book.prompt_length}
            if not fresh:
                continue
            tokens = sorted(fresh)
            for part in blocks(tokens, self.bits.shape[1]):
                book.cause = book.cause or book.pool.add(part, self.bits[[fresh[t] for t in part]])
            done = set(tokens).difference(book.kept(tokens[0], tokens[-1] + 1))
            self.ring.give_back([book.slots.pop(token) for token in sorted(done)])

    def _open_books(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            extra = (params.extra_args if params is not None else None) or {}
            key = extra.get(KEY_ARG)
            if key is None:
                continue
            if isinstance(key, list):  # vLLM names the i-th answer's request i_<name>
                key = key[int(request.req_id.partition("_")[0])]
            n = len(request.prompt_token_ids)
            if TAIL_ARG in extra:  # the finished sample's last token, over what its first request computed
                if book := self.books.get(key):
                    self._follow(request.req_id, book, n - 1)
                continue
            if key in self.books:
                continue
            q = int(extra.get(PROMPT_LENGTH_ARG, n))
            names, tokens = (("last_q", "-1"), None) if key == CANARY else (self.plan.positions, self.plan.tokens)
            if POSITIONS_ARG in extra:
                names, tokens = parse_positions(extra[POSITIONS_ARG])
            book = self.books[key] = Book(
                prompt_length=q,
                want=wanted(names, tokens, q),
                tokens=extra.get(TOKENS_ARG),
                end=n if PROMPT_LENGTH_ARG in extra else n + params.max_tokens,
            )
            if book.want.pools:
                book.pool = PromptPool(book.want.pools, request.prompt_token_ids[:q], self.check)
            self._follow(request.req_id, book, -1)
            if request.num_computed_tokens:
                book.cause = f"{request.num_computed_tokens} tokens came from the prefix cache and were not computed"

    def _follow(self, request_id: str, book: Book, only: int) -> None:
        """only : the one token that this request is for, or -1."""
        self._book_of[request_id] = book, only
        book.requests.add(request_id)

    # Called by the driver's verbs.

    def drop(self, key: str) -> None:
        """Forget a sample and free its rows."""
        book = self.books.pop(key, None)
        if book is None:
            return
        with book.lock:
            slots, book.slots = book.slots.values(), {}
            self.ring.give_back([slot for slot in slots if slot >= 0])
            if self.spill is not None:
                self.spill.free([-1 - slot for slot in slots if slot < 0])
        for request_id in book.requests:
            # a runner may call a resumed request new again, and a name may have gone to another sample
            if self._book_of.get(request_id, (None, -1))[0] is book:
                del self._book_of[request_id]

    def rows(self, key: str, tokens: Sequence[int]) -> np.ndarray | str:
        """(token, element) of captured tokens as stored bits, or why they are not there."""
        book = self.books.get(key)
        if book is None:
            return "the worker has seen no request of this sample"
        with book.lock:
            if book.cause is not None:
                return book.cause
            missing = sorted({token for token in tokens if token not in book.slots})
            if missing:
                return f"tokens {missing[:10]} were never captured"
            slots = np.array([book.slots[token] for token in tokens], np.int64)
            spilled = np.flatnonzero(slots < 0)
            rows = self.bits[np.maximum(slots, 0)]
            if len(spilled):
                rows[spilled] = self.spill.read((-1 - slots[spilled]).tolist())
            return rows
