"""The publisher: full shards become files, and samples whose files are all durable become a commit.

Two threads work one behind the other: one hands a shard's bytes to the backend, which frees its buffer, and the other
makes them durable and commits, while the next shard is filled and handed over.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store.backend import Backend, Batch
from hiddenlake.cache.store.claims import Claims, sample_claim, token_claim
from hiddenlake.cache.store.codecs import Encoding
from hiddenlake.cache.store.commit_rules import check_commits
from hiddenlake.cache.store.commits import Commit, FileRecord, Loss, Record, list_commits, read_commits
from hiddenlake.cache.store.derived import derived_chunks
from hiddenlake.cache.store.layout import TOKENS, Layout, encode_numbers
from hiddenlake.cache.store.shard import Shard, ShardBuffer, TokenBuffer, TokenShard
from hiddenlake.cache.store.tables import encode_samples

_AnyBuffer = TypeVar("_AnyBuffer", ShardBuffer, TokenBuffer)


@dataclass(frozen=True, slots=True)
class _Durable:
    """A token shard whose files are durable. columns : chunks along the token axis that are in them."""

    fencing: int
    columns: int
    files: dict[str, Record]
    losses: dict[str, Loss]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sample shard whose files are durable, until its samples' tokens are.

    samples, spans : by slot.
    """

    number: int
    fencing: int
    samples: Mapping[int, Sample]
    spans: Mapping[int, tuple[int, int]]
    files: dict[str, Record]
    losses: dict[str, Loss]


class Publisher:
    """Writes shards in the background, one behind the other, and commits what is complete.

    commits : all commits of the capture, of all writers, as of the last `refresh`.
    committed, token_shards : keys of their samples, and the token shards that they vouch for.
    published, bytes_written : samples that were committed here, and bytes of the files that were written for that.
    provenance : kept with each commit.
    replaces : (shard, fencing) of commits whose samples are written again: each commit of this publisher replaces them.
    """

    def __init__(
        self,
        place: Backend,
        layout: Layout,
        claims: Claims,
        provenance: dict[str, Any],
        lock: threading.RLock,
        replaces: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.place, self.layout, self.provenance = place, layout, provenance
        self.commits: dict[int, Commit] = {}
        self.committed: set[str] = set()
        self.token_shards: set[int] = set()
        self.published = 0
        self.bytes_written = 0
        self._claims, self._lock, self._replaces = claims, lock, tuple(replaces)
        self._durable: dict[int, _Durable] = {}
        self._waiting: list[_Waiting] = []
        self._futures: list[Future[Any]] = []
        # The last two that were handed to `_publishing`: while one is made durable, the next may be written.
        self._behind: list[Future[None] | None] = [None, None]
        self._error: BaseException | None = None
        self._writing = ThreadPoolExecutor(1, "hiddenlake-writing")
        self._publishing = ThreadPoolExecutor(1, "hiddenlake-publishing")

    def refresh(self) -> dict[int, Commit]:
        """Read the commits that are new. Returns all, by shard."""
        new = read_commits(self.place, list_commits(self.place) - self.commits.keys())
        check_commits(self.place, self.layout, new.values())
        for shard, commit in new.items():
            self.token_shards.update(commit.token_shards)
            if (shard, commit.fencing) in self._replaces:
                self.commits[shard] = commit
            else:
                self._remember(commit)
        return self.commits

    def _remember(self, commit: Commit) -> None:
        self.commits[commit.shard] = commit
        self.committed.update(key for key in commit.keys if key is not None)
        self.token_shards.update(commit.token_shards)

    def check(self) -> None:
        """Raise what went wrong in the background."""
        for future in [future for future in self._futures if future.done()]:
            self._futures.remove(future)
            self._error = self._error or future.exception()
        if self._error is not None:
            raise StoreError(f"publishing to {self.place} failed: {self._error}") from self._error

    def pending(self) -> list[Future[None]]:
        """What is still to be written."""
        return list(self._futures)

    def close(self) -> None:
        """Wait until all is written."""
        self._writing.shutdown(wait=True)
        self._publishing.shutdown(wait=True)

    def publish_samples(
        self,
        shard: Shard,
        samples: Mapping[int, Sample],
        spans: Mapping[int, tuple[int, int]],
        recycle: Callable[[ShardBuffer], None],
    ) -> Future[None]:
        """Write a sample shard; commit it once the tokens of its samples are durable too.

        samples, spans : slot -> sample, and (start, length) of its tokens where the capture holds tokens.
        recycle : called when the buffer may be filled again.
        """

        layout, k = self.layout, shard.number

        def write(batch: Batch) -> tuple[dict[str, Record], dict[str, Loss]]:
            self._check_claim(sample_claim(k), shard.fencing)
            for slot in set(range(layout.samples)) - samples.keys():
                shard.buffer.empty(slot)
            files, losses = {}, {}
            for site, encoding in shard.buffer.seal().items():
                files |= self._add(batch, *layout.cell_names(site, k), encoding)
                losses |= {site: encoding.loss} if encoding.loss else {}
            table = encode_samples(samples)
            batch.add(layout.samples_file(k), [table])
            return files | {layout.samples_file(k): FileRecord.of(table)}, losses

        def publish(files: dict[str, Record], losses: dict[str, Loss]) -> None:
            self._waiting.append(_Waiting(k, shard.fencing, samples, spans, files, losses))

        return self._submit(sample_claim(k), shard.buffer, write, publish, recycle)

    def publish_tokens(
        self, shard: TokenShard, kept: list[slice], recycle: Callable[[TokenBuffer], None]
    ) -> Future[None]:
        """Write a token shard, of which some rows are kept, and commit what waited for it."""
        layout, j, columns = self.layout, shard.number, 0

        def write(batch: Batch) -> tuple[dict[str, Record], dict[str, Loss]]:
            nonlocal columns
            self._check_claim(token_claim(j), shard.fencing)
            columns, sealed = shard.buffer.seal(kept)
            files, losses = {}, {}
            for site, encoding in sealed.items():
                files |= self._add(batch, *layout.token_names(site, j), encoding)
                losses |= {site: encoding.loss} if encoding.loss else {}
            return files, losses

        def publish(files: dict[str, Record], losses: dict[str, Loss]) -> None:
            self._durable[j] = _Durable(shard.fencing, columns, files, losses)
            with self._lock:
                self.bytes_written += sum(record.size for record in files.values())

        return self._submit(token_claim(j), shard.buffer, write, publish, recycle)

    @staticmethod
    def _add(batch: Batch, data: str, row_crc: str, scale: str, encoding: Encoding) -> dict[str, Record]:
        """A site's data, row checksums and scales."""
        batch.add(data, encoding, encoding.size)
        files = {data: encoding.record}
        for name, values in ((row_crc, encoding.checksums), (scale, encoding.scale)):
            if values is not None:
                raw = encode_numbers(values)
                batch.add(name, [raw])
                files[name] = FileRecord.of(raw)
        return files

    def _submit(
        self,
        claim: str,
        buffer: _AnyBuffer,
        write: Callable[[Batch], tuple[dict[str, Record], dict[str, Loss]]],
        publish: Callable[[dict[str, Record], dict[str, Loss]], None],
        recycle: Callable[[_AnyBuffer], None],
    ) -> Future[None]:
        """Returns the future of what frees the buffer; that of the rest is among `pending` too."""

        def writing() -> tuple[Batch, dict[str, Record], dict[str, Loss]] | None:
            if behind is not None:
                wait([behind])  # else a disk that is slower than the memory would have ever more to make durable
            if self._error is not None:
                return None
            batch = self.place.batch()
            with self._noting_errors(batch):
                found = write(batch)
            buffer.renew()
            with self._lock:
                recycle(buffer)
            return batch, *found

        def publishing() -> None:
            if written.exception() is not None or (found := written.result()) is None:
                return
            batch, files, losses = found
            with self._noting_errors(batch):
                if self._error is not None:
                    batch.discard()
                    return
                self.place.settle(claim)
                batch.publish()
                publish(files, losses)
                for waiting in [waiting for waiting in self._waiting if self._needed(waiting) <= self._durable.keys()]:
                    self._waiting.remove(waiting)
                    self._commit(waiting)

        behind = self._behind[0]
        written = self._writing.submit(writing)
        published = self._publishing.submit(publishing)
        self._behind = [self._behind[1], published]
        self._futures += [written, published]
        return written

    @contextmanager
    def _noting_errors(self, batch: Batch) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # Known here at once, so that a shard that waits behind this one is not written.
            self._error = self._error or error
            batch.discard()
            raise

    def _needed(self, waiting: _Waiting) -> set[int]:
        return {shard for span in waiting.spans.values() for shard in self.layout.token_shards_of(*span)}

    def _check_claim(self, claim: str, fencing: int) -> None:
        if self._claims.read(claim) != (self._claims.writer, fencing):
            raise StoreError(
                f"{self.place}: {claim} is no longer ours: these samples were not stored; run the same command again"
            )

    def _commit(self, waiting: _Waiting) -> None:
        """The commit, then what is derived from it."""
        self._check_claim(sample_claim(waiting.number), waiting.fencing)
        needed = {shard: self._durable[shard] for shard in sorted(self._needed(waiting))}
        for shard, durable in needed.items():
            self._check_claim(token_claim(shard), durable.fencing)
        samples, every = waiting.samples, range(self.layout.samples)
        commit = Commit(
            waiting.number,
            self._claims.writer,
            waiting.fencing,
            self.provenance,
            tuple(samples[slot].key if slot in samples else None for slot in every),
            tuple((samples[slot].index, samples[slot].sample_index) if slot in samples else None for slot in every),
            waiting.files | {name: record for durable in needed.values() for name, record in durable.files.items()},
            datetime.now(UTC).isoformat(timespec="seconds"),
            tuple(waiting.spans.get(slot) for slot in every) if self.layout.token_files else (),
            {shard: durable.columns for shard, durable in needed.items()},
            waiting.losses | {f"{TOKENS}/{site}": loss for site, loss in self._token_losses(needed.values()).items()},
            self._replaces,
        )
        self._claims.check()
        commit.publish(self.place)
        with self._lock:
            self._remember(commit)
            self.published += len(samples)
            self.bytes_written += sum(record.size for record in waiting.files.values())
        cells = {slot: (sample.token_index, sample.prompt_length) for slot, sample in samples.items()}
        for name, data in derived_chunks(self.layout, commit, cells).items():
            # Rebuilt from the commits where a power cut takes it away.
            self.place.write(name, data, durable=False)

    @staticmethod
    def _token_losses(shards: Iterable[_Durable]) -> dict[str, Loss]:
        """Over whole token shards, which commits share."""
        found: dict[str, Loss] = {}
        for durable in shards:
            for site, loss in durable.losses.items():
                found[site] = found[site] + loss if site in found else loss
        return found
