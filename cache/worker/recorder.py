"""Recorder: which row belongs to which token of which sample, from the first prefill to the shard."""

import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hiddenlake.cache import positions
from hiddenlake.cache.rows import TapTable, find_fault, put_rows
from hiddenlake.cache.store.shard import attach
from hiddenlake.cache.worker.bits import as_bits
from hiddenlake.cache.worker.plan import CANARY, KEY_ARG, Placement, Plan
from hiddenlake.cache.worker.rows_v1 import batch_rows
from hiddenlake.cache.worker.staging import Staging

@dataclass(slots=True)
class Book:
    """What is kept of one request.

    slots : token index -> slot of the arena. Written by absolute position, so a token that is computed
        again (preemption, rejected drafts) lands where it was.
    cause : why the sample cannot be stored, once something went wrong.
    """

    prompt_length: int
    prompt_tokens: frozenset[int]
    answer_offsets: set[int] | None
    end: int
    slots: dict[int, int] = field(default_factory=dict)
    cause: str | None = None

    def wants(self, token: int) -> bool:
        if token < self.prompt_length:
            return token in self.prompt_tokens
        return token < self.end and (self.answer_offsets is None or token - self.prompt_length in self.answer_offsets)


class Recorder:
    """Follows the batches of one model runner and keeps the rows that its samples may need."""

    def __init__(self, runner: Any, plan: Plan, table: TapTable, staging: Staging, embedding: torch.Tensor) -> None:
        self.runner = runner
        self.plan = plan
        self.table = table
        self.staging = staging
        self.embedding = embedding
        self.books: dict[str, Book] = {}
        self.recomputed = 0
        self._key_of: dict[str, str] = {}
        self._slots: list[int] = []
        self._arena = as_bits(staging.arena)

    # Called around the runner's forward pass. An error here must not kill the generation, and must not be
    # silent either: every sample in flight fails with it.

    def before_forward(self, scheduler_output: Any) -> None:
        try:
            self._open_books(scheduler_output)
            rows: list[int] = []
            slots: list[int] = []
            for request_id, first, start, n in batch_rows(self.runner, scheduler_output):
                key = self._key_of.get(request_id)
                book = self.books.get(key) if key is not None else None
                if book is None or book.cause is not None:
                    continue
                for token in range(start, start + n):
                    if book.wants(token):
                        slot = book.slots.get(token)
                        if slot is None:
                            slot = self.staging.take()
                        else:
                            self.recomputed += 1
                        if slot is None:
                            book.cause = f"the ring was full at token {token}"
                            break
                        book.slots[token] = slot
                        rows.append(first + token - start)
                        slots.append(slot)
            if len(rows) > len(self.staging.buffers.rows):
                raise RuntimeError(
                    f"a step wants {len(rows)} rows, but the tap buffers hold {len(self.staging.buffers.rows)}"
                )
            self.staging.begin(rows)
            self._slots = slots
        except Exception:  # noqa: BLE001 - reported as the cause of every sample in flight
            self._slots = []
            self._fail_all(traceback.format_exc(limit=3))

    def after_forward(self) -> None:
        try:
            self.staging.collect(self._slots)
        except Exception:  # noqa: BLE001 - reported as the cause of every sample in flight
            self._fail_all(traceback.format_exc(limit=3))
        self._slots = []

    def _fail_all(self, cause: str) -> None:
        for book in self.books.values():
            book.cause = book.cause or f"capture failed in the worker: {cause}"

    def _open_books(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            key = (params.extra_args or {}).get(KEY_ARG) if params is not None else None
            if key is None or key in self.books:
                continue
            q = len(request.prompt_token_ids)
            wanted = ("last_q", "-1") if key == CANARY else self.plan.positions
            book = self.books[key] = Book(
                prompt_length=q,
                prompt_tokens=frozenset(positions.prompt_rows(wanted, q)),
                answer_offsets=positions.answer_rows(wanted),
                end=q + params.max_tokens,
            )
            self._key_of[request.req_id] = key
            if request.num_computed_tokens:
                book.cause = f"{request.num_computed_tokens} tokens came from the prefix cache and were not computed"

    # Called by the driver, through the extension's verbs.

    def store(self, placement: Placement, handle: dict[str, Any]) -> str | None:
        """Copy a finished sample's rows into its slot of the shard, or say why that cannot be done.

        Nothing is written unless every cell can be: each token was captured, each value is finite, and each
        row's `embed` is bit for bit the embedding of the token that the answer has there.
        """
        self.staging.drain()
        book = self.books.get(placement.key)
        if book is None:
            return "the worker has seen no request of this sample"
        if book.cause is not None:
            return book.cause
        present = [(p, token) for p, token in enumerate(placement.token_index) if token >= 0]
        missing = sorted({token for _, token in present if token not in book.slots})
        if missing:
            return f"tokens {missing} were never captured"
        rows = self._arena[:, [book.slots[token] for _, token in present]]
        ids = torch.tensor([placement.token_ids[token] for _, token in present], device=self.embedding.device)
        embedding = self.embedding[ids].to("cpu", self.staging.arena.dtype)
        if fault := find_fault(self.table, rows, as_bits(embedding)):
            return fault
        put_rows(attach(handle), self.table, rows, [p for p, _ in present], placement.slot)
        return None

    def drop(self, key: str) -> None:
        """Forget a sample and free its rows."""
        if book := self.books.pop(key, None):
            self.staging.give_back(list(book.slots.values()))
        for request_id in [r for r, k in self._key_of.items() if k == key]:
            del self._key_of[request_id]

    def row(self, key: str, token: int) -> np.ndarray | None:
        """(tap, hidden) of one captured token as stored bits, or None when it was not captured."""
        self.staging.drain()
        book = self.books.get(key)
        if book is None or book.cause is not None or token not in book.slots:
            return None
        return self._arena[:, book.slots[token]]
