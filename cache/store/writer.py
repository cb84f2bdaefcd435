"""The writer: samples in, committed shards out. Several processes may write one capture."""

import heapq
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from hiddenlake.cache.errors import BadInputError, IdentityError, StoreError
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.store import claims as _claims
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.claims import Claims
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.derived import rebuild
from hiddenlake.cache.store.layout import BUFFERS, Layout
from hiddenlake.cache.store.publisher import Publisher
from hiddenlake.cache.store.root import Root, grow, has_root, new_root, read_root
from hiddenlake.cache.store.shard import Shard, ShardBuffer, TokenShard
from hiddenlake.cache.store.sizes import check_buffers, choose_layout
from hiddenlake.cache.store.spans import Spans, TokenPiece, TokenSpan
from hiddenlake.cache.store.tables import encode_failures

# A run in which everything fails must not rewrite its list of failures for each.
_FAILURES_SECONDS = 1.0


def open_writer(
    path: str | Path | Backend,
    *,
    identity: dict[str, Any],
    coverage: Coverage,
    provenance: dict[str, Any],
    planned: int,
    buffer_bytes: int = 2 << 30,
    shard_samples: int | None = None,
    shard_tokens: tuple[int, int] | None = None,
    codec: str | None = None,
    shared: bool = False,
) -> "Writer":
    """Create a capture, or open it to write more of it. Leftovers of dead writers are removed first.

    path : a folder, or `s3://bucket/lake/name`.
    identity : what makes two activations the same numbers; plain JSON, compared field by field.
    provenance : engine, versions, hardware: plain JSON, kept with each commit.
    planned : samples of the whole run; the axes are made for them and grow when they must.
    buffer_bytes : memory that the shard buffers may take: two for samples, and two for tokens.
    shard_samples, shard_tokens : B, and (T, tokens a shard), where they should not be chosen by `choose_layout`; an
        existing capture keeps its own.
    codec : `none` (the default of a new capture), `zstd`, or `fp8`, which loses something, measures it and says so.
    shared : whether other processes of this host fill its shards, by their handles.

    Raises IdentityError where the folder holds another identity or coverage, StoreError where it is
    not empty and no capture, of an unknown version, or the buffers do not fit.
    """
    place = open_backend(path)
    identity, provenance = _plain("identity", identity), _plain("provenance", provenance)
    if planned < 0 or (shard_samples is not None and shard_samples < 1):
        raise ValueError(f"planned {planned} and shard_samples {shard_samples}: expected 0 or more, and 1 or more")
    if not has_root(place):
        layout = choose_layout(coverage, planned, buffer_bytes, shard_samples, shard_tokens, codec or "none")
        root = new_root(identity, layout, planned, provenance)
        # When another process was faster, its capture is opened, and checked, like any other.
        made = place.make(root.files() | layout.coordinates(), list(layout.folders()))
        if not made and not has_root(place):
            raise StoreError(f"{place} is not empty and is no capture: name another folder, or empty it")
    root = read_root(place)
    root.check(place, identity, coverage)
    if codec not in (None, root.layout.codec):
        raise IdentityError(
            f"{place} is stored with the codec {root.layout.codec}, not {codec}: name another folder, or leave the codec out"
        )
    check_buffers(root.layout, buffer_bytes)
    return Writer(place, root, provenance, shared=shared)


@dataclass(slots=True)
class _Filling:
    """A claimed shard between its claim and its publishing. samples, spans : by slot."""

    shard: Shard
    free: list[int]
    handed_out: set[int] = field(default_factory=set)
    samples: dict[int, Sample] = field(default_factory=dict)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)


class Writer:
    """One process's hand on a capture; made by `open_writer`. Its methods may be called from several threads.

    place : where the capture lies.
    layout : its files, and how large they are.
    replaces : (shard, fencing) of commits whose samples are written again, all of them in one shard: its commit replaces
        them.
    shared : see `open_writer`.
    """

    def __init__(
        self,
        place: Backend,
        root: Root,
        provenance: dict[str, Any],
        *,
        replaces: Sequence[tuple[int, int]] = (),
        shared: bool = False,
    ) -> None:
        self.place = place
        self._shared = shared
        self.coverage = root.coverage
        self.layout: Layout = root.layout
        self._lock = threading.RLock()
        self._reserved: set[str] = set()
        self._added: set[str] = set()
        self._filling: list[_Filling] = []
        self._buffers: list[ShardBuffer] = []
        self._idle: list[ShardBuffer] = []
        self._raised = False
        self._closed = False
        self._left = False
        self._failures: dict[str, tuple[Failure, datetime]] = {}
        self._failures_written = (0, -_FAILURES_SECONDS)
        self._claims: Claims = _claims.enter(place, self.layout)
        self._publisher = Publisher(place, self.layout, self._claims, provenance, self._lock, replaces)
        self._spans = Spans(self.layout, self._lock, self._claim_tokens, self._publish_tokens, self._check, shared)
        try:
            with self._claims.lock():
                self._publisher.refresh()
                self._claims.sweep(self._publisher.refresh)
                # Another process may have grown the axes since the root was read.
                rebuild(place, read_root(place), list(self._publisher.commits.values()))
        except BaseException:
            self._publisher.close()
            self._claims.leave()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def shard_samples(self) -> int:
        """B."""
        return self.layout.samples

    @property
    def committed(self) -> set[str]:
        """Keys of all committed samples, of all writers, as of the last `reserve`. Not to be changed."""
        return self._publisher.committed

    @property
    def published(self) -> int:
        """Samples that this writer committed."""
        return self._publisher.published

    @property
    def bytes_written(self) -> int:
        """Bytes of the files that this writer published."""
        return self._publisher.bytes_written

    @property
    def provenance(self) -> dict[str, Any]:
        """Kept with each commit; may be set again, e.g. once an engine has started."""
        return self._publisher.provenance

    @provenance.setter
    def provenance(self, provenance: dict[str, Any]) -> None:
        self._publisher.provenance = provenance

    def reserve(self, keys: Sequence[str], limit: int) -> list[str]:
        """The next samples to work on: up to `limit` of `keys`, in their order.

        Left out are keys that are committed, that another living writer reserved, and that this writer
        reserved before. Processes that run the same command on one capture split the work this way.
        """
        with self._lock:
            self._check()
            with self._claims.lock():
                self._publisher.refresh()
                taken = self.committed | self._reserved | self._claims.reserved_by_others()
                chosen = []
                for key in dict.fromkeys(keys):
                    if len(chosen) >= limit:
                        break
                    if key not in taken:
                        chosen.append(key)
                if chosen:
                    self._claims.reserve(chosen)
                    self._reserved.update(chosen)
            return chosen

    def slot(self) -> tuple[Shard, int]:
        """A free slot: the sample's cells go to `shard.views[site][..., slot, :]`, then call `add` or `release`.

        Blocks while both shard buffers are being published. Raises StoreError when all slots of both are handed out, or
        filled and waiting for those of their shard that are: with other threads at work, ask again once one has added.
        """
        while True:
            with self._lock:
                self._check()
                for filling in self._filling:
                    if filling.free:
                        break
                else:
                    filling = self._claim()
                if filling is not None:
                    slot = heapq.heappop(filling.free)
                    filling.handed_out.add(slot)
                    filling.shard.buffer.clear(slot)
                    return filling.shard, slot
                publishing = self._publisher.pending()
                handed_out = sum(len(filling.handed_out) for filling in self._filling)
            if not publishing:
                raise StoreError(
                    f"all {BUFFERS * self.layout.samples} slots of both shard buffers are handed out ({handed_out}) or "
                    f"wait for those that are: add or release some before asking for more, or open the capture with "
                    f"more buffer memory"
                )
            wait(publishing, return_when=FIRST_COMPLETED)

    def span(self, length: int) -> TokenSpan:
        """A place for a sample's tokens on the token axis: ask for its pieces, then call `add` or `release`.

        length : tokens of the sample that are stored.
        """
        with self._lock:
            self._check()
            if self.coverage.tokens is None:
                raise StoreError(f"{self.place} holds no tokens: name tokens in its coverage to store them")
            return self._spans.reserve(length)

    def piece(self, span: TokenSpan) -> TokenPiece | None:
        """The next rows of a span, in one token shard: they go to `piece.shard.views[site][..., piece.rows, :]`.

        Blocks while token buffers are being published. None when both buffers hold rows that are not filled, or that
        belong to spans that were asked for before: fill those first.
        """
        return self._spans.piece(span)

    def filled(self, piece: TokenPiece) -> None:
        """A piece's rows are complete.

        Raises CaptureError where a value is not finite; the piece may then be written again, or its span released.
        """
        self._spans.filled(piece)

    def add(self, shard: Shard, slot: int, sample: Sample, span: TokenSpan | None = None) -> None:
        """The slot's cells, and all pieces of the span, are complete: the sample will be committed with its shard.

        span : where the capture holds tokens.

        The shard is published in the background once all its slots are added, and committed once the token shards
        that its samples lie in are full and published too. Acknowledged is what `published` counts or `flush`
        returned for; anything else is captured again after a crash.

        Raises CaptureError where a cell whose token is present is not finite, or one that is absent is not
        NaN; the slot is then still handed out, to be filled again or released.
        """
        self.coverage.check_token_index(sample.token_index, sample.total_length)
        complete = sample.status == "complete"
        self.coverage.check_tokens(span.length if span else 0, sample.prompt_length, sample.total_length, complete)
        with self._lock:
            self._check()
            if self.coverage.tokens:
                self._spans.check_filled(span)
            filling = self._filling_of(shard, slot)
            if sample.key not in self._reserved:
                raise StoreError(f"sample {sample.key} was not reserved by this writer: call `reserve` first")
            if sample.key in self._added or sample.key in self.committed:
                raise StoreError(f"sample {sample.key} was added before: a key is stored once")
        # Here and not when the shard is published: here it overlaps with the writing of the shard before.
        shard.buffer.finish(slot, np.asarray(sample.token_index) != ABSENT)
        with self._lock:
            if sample.key in self._added:
                raise StoreError(f"sample {sample.key} was added before: a key is stored once")
            filling.handed_out.remove(slot)
            filling.samples[slot] = sample
            if self.coverage.tokens:
                self._spans.add(span)
                filling.spans[slot] = span.start, span.length
            self._added.add(sample.key)
            self._failures.pop(sample.key, None)
            if len(filling.samples) == self.layout.samples:
                self._publish(filling)

    def release(self, shard: Shard, slot: int, span: TokenSpan | None = None) -> None:
        """Give a slot, and a span, back unused. Whatever was written there is forgotten."""
        with self._lock:
            filling = self._filling_of(shard, slot)
            if span is not None:
                self._spans.release(span)
            filling.handed_out.remove(slot)
            heapq.heappush(filling.free, slot)

    def fail(self, failure: Failure) -> None:
        """Record a sample that could not be captured. It is tried again by the next run."""
        with self._lock:
            self._check()
            self._failures[failure.key] = failure, datetime.now(UTC)
            self._write_failures(at_most_once_a_second=True)

    def flush(self) -> None:
        """Publish what was added, in shards that keep free slots and holes, and wait until all is committed.

        Raises StoreError when slots or spans are still handed out, or publishing failed.
        """
        with self._lock:
            self._check()
            handed_out = sum(len(filling.handed_out) for filling in self._filling)
            if handed_out or self._spans.open:
                raise StoreError(
                    f"{handed_out} slots are still handed out, and {self._spans.open} spans: "
                    f"add or release them before a flush"
                )
            self._spans.close_shard()
            for filling in [filling for filling in self._filling if filling.samples]:
                self._publish(filling)
            publishing = self._publisher.pending()
        wait(publishing)
        with self._lock:
            self._check()
            self._write_failures()

    def close(self) -> None:
        """Publish what was added, forget what is still handed out, and leave. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if not self._raised:
                self._spans.release_all()
                for filling in list(self._filling):
                    for slot in list(filling.handed_out):
                        self.release(filling.shard, slot)
                self.flush()
        finally:
            self._publisher.close()
            self._left = True
            self._claims.leave()
            self._spans.close()
            for buffer in self._buffers:
                buffer.close()

    def _check(self) -> None:
        """Raise what went wrong in the background; from then on this writer only refuses."""
        if self._left:
            raise StoreError(f"this writer of {self.place} is closed: open another one")
        try:
            self._publisher.check()
        except StoreError:
            self._raised = True
            raise

    def _filling_of(self, shard: Shard, slot: int) -> _Filling:
        for filling in self._filling:
            if filling.shard is shard and slot in filling.handed_out:
                return filling
        raise StoreError(f"slot {slot} of shard {shard.number} is not handed out: pass what `slot()` returned, once")

    def _claim(self) -> _Filling | None:
        """Claim a shard for an idle buffer; None when there is none."""
        if not self._idle:
            if len(self._buffers) == BUFFERS:
                return None
            self._buffers.append(ShardBuffer(self.layout, self._shared))
            self._idle.append(self._buffers[-1])
        with self._claims.lock():
            number, fencing = self._claims.claim()
            grow(self.place, number + 1, 0)
        filling = _Filling(Shard(number, fencing, self._idle.pop()), list(range(self.layout.samples)))
        self._filling.append(filling)
        return filling

    def _claim_tokens(self, first: int | None, shards: int) -> dict[int, int]:
        with self._claims.lock():
            self._publisher.refresh()
            claimed = self._claims.claim_tokens(first, shards, self._publisher.token_shards)
            grow(self.place, 0, max(claimed, default=-1) + 1)
        return claimed

    def _publish(self, filling: _Filling) -> None:
        self._filling.remove(filling)
        self._publisher.publish_samples(filling.shard, filling.samples, filling.spans, self._idle.append)

    def _publish_tokens(self, shard: TokenShard, kept: list[slice]) -> Future[None]:
        return self._publisher.publish_tokens(shard, kept, self._spans.recycle)

    def _write_failures(self, at_most_once_a_second: bool = False) -> None:
        count, when = self._failures_written
        if at_most_once_a_second and time.monotonic() - when < _FAILURES_SECONDS:
            return
        if self._failures or count:
            data = encode_failures(self._failures.values())
            self.place.write(f"failures/{self._claims.writer}.parquet", data)
        self._failures_written = len(self._failures), time.monotonic()


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back, so that comparing it with a stored one is comparing like with like."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{name} is not plain JSON ({error}): use strings, numbers, lists and dicts") from error
