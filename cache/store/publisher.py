"""The publisher: full shards become files, and samples whose files are all durable become a commit."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crc32c import crc32c

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store.claims import Claims, sample_claim, token_claim
from hiddenlake.cache.store.commits import Commit, FileRecord, list_commits, read_commit
from hiddenlake.cache.store.derived import derived_chunks
from hiddenlake.cache.store.files import write_atomic
from hiddenlake.cache.store.layout import Layout, encode_numbers
from hiddenlake.cache.store.shard import Shard, ShardBuffer, TokenBuffer, TokenShard
from hiddenlake.cache.store.tables import encode_samples


@dataclass(frozen=True, slots=True)
class _Durable:
    """A token shard whose files are durable. columns : chunks along the token axis that are in them."""

    fencing: int
    columns: int
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sample shard whose files are durable, until its samples' tokens are.

    samples, spans : by slot.
    """

    number: int
    fencing: int
    samples: Mapping[int, Sample]
    spans: Mapping[int, tuple[int, int]]
    files: dict[str, FileRecord]


class Publisher:
    """Writes shards in the background, one behind the other, and commits what is complete.

    commits : all commits of the capture, of all writers, as of the last `refresh`.
    committed, token_shards : keys of their samples, and the token shards that they vouch for.
    published, bytes_written : samples that were committed here, and bytes of the files that were written for that.
    provenance : kept with each commit.
    """

    def __init__(
        self, path: Path, layout: Layout, claims: Claims, provenance: dict[str, Any], lock: threading.RLock
    ) -> None:
        self.path, self.layout, self.provenance = path, layout, provenance
        self.commits: dict[int, Commit] = {}
        self.committed: set[str] = set()
        self.token_shards: set[int] = set()
        self.published = 0
        self.bytes_written = 0
        self._claims, self._lock = claims, lock
        self._durable: dict[int, _Durable] = {}
        self._waiting: list[_Waiting] = []
        self._futures: list[Future[None]] = []
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "hiddenlake-publisher")

    def refresh(self) -> None:
        """Read the commits that are new."""
        for shard in list_commits(self.path) - self.commits.keys():
            self._remember(read_commit(self.path, shard))

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
            raise StoreError(f"publishing to {self.path} failed: {self._error}") from self._error

    def pending(self) -> list[Future[None]]:
        """What is still to be written."""
        return list(self._futures)

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown(wait=True)

    def publish_samples(
        self,
        shard: Shard,
        samples: Mapping[int, Sample],
        spans: Mapping[int, tuple[int, int]],
        recycle: Callable[[ShardBuffer], None],
    ) -> None:
        """Write a sample shard; commit it once the tokens of its samples are durable too.

        samples, spans : slot -> sample, and (start, length) of its tokens where the capture holds tokens.
        recycle : called when the buffer may be filled again.
        """

        def write() -> None:
            files = self._write_samples(shard, samples)
            with self._lock:
                recycle(shard.buffer)
            self._waiting.append(_Waiting(shard.number, shard.fencing, samples, spans, files))

        self._submit(write)

    def publish_tokens(
        self, shard: TokenShard, kept: list[slice], recycle: Callable[[TokenBuffer], None]
    ) -> Future[None]:
        """Write a token shard, of which some rows are kept, and commit what waited for it."""

        def write() -> None:
            self._durable[shard.number] = self._write_tokens(shard, kept)
            with self._lock:
                recycle(shard.buffer)

        return self._submit(write)

    def _submit(self, write: Callable[[], None]) -> Future[None]:
        def work() -> None:
            if self._error is not None:
                return
            try:
                write()
                for waiting in [waiting for waiting in self._waiting if self._needed(waiting) <= self._durable.keys()]:
                    self._waiting.remove(waiting)
                    self._commit(waiting)
            except BaseException as error:
                # Known here at once, so that a shard that waits behind this one is not written.
                self._error = error
                raise

        self._futures.append(self._thread.submit(work))
        return self._futures[-1]

    def _needed(self, waiting: _Waiting) -> set[int]:
        return {shard for span in waiting.spans.values() for shard in self.layout.token_shards_of(*span)}

    def _check_claim(self, claim: str, fencing: int) -> None:
        if self._claims.read(claim) != (self._claims.writer, fencing):
            raise StoreError(
                f"{self.path}: {claim} is no longer ours: these samples were not stored; run the same command again"
            )

    def _write_samples(self, shard: Shard, samples: Mapping[int, Sample]) -> dict[str, FileRecord]:
        """Data, row checksums, samples."""
        layout, k, buffer = self.layout, shard.number, shard.buffer
        self._check_claim(sample_claim(k), shard.fencing)
        for slot in set(range(layout.samples)) - samples.keys():
            buffer.clear(slot)
        files = {}
        for site, whole in buffer.seal().items():
            files |= self._write_data(layout.data_file(site, k), [buffer.images[site]], whole)
            files |= self._write(layout.row_crc_file(site, k), encode_numbers(buffer.checksums[site]))
        return files | self._write(layout.samples_file(k), encode_samples(samples))

    def _write_tokens(self, shard: TokenShard, kept: list[slice]) -> _Durable:
        """Data and row checksums."""
        layout, j, buffer = self.layout, shard.number, shard.buffer
        self._check_claim(token_claim(j), shard.fencing)
        files = {}
        columns, sealed = buffer.seal(kept)
        for site, (parts, whole) in sealed.items():
            files |= self._write_data(layout.token_data_file(site, j), parts, whole)
            files |= self._write(layout.token_row_crc_file(site, j), encode_numbers(buffer.checksums[site]))
        with self._lock:
            self.bytes_written += sum(record.size for record in files.values())
        return _Durable(shard.fencing, columns, files)

    def _write(self, name: str, data: bytes) -> dict[str, FileRecord]:
        write_atomic(self.path / name, data)
        return {name: FileRecord(len(data), crc32c(data))}

    def _write_data(self, name: str, parts: list[Any], whole: int) -> dict[str, FileRecord]:
        write_atomic(self.path / name, *parts, preallocate=True)
        return {name: FileRecord(sum(memoryview(part).nbytes for part in parts), whole)}

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
        )
        commit.publish(self.path)
        with self._lock:
            self._remember(commit)
            self.published += len(samples)
            self.bytes_written += sum(record.size for record in waiting.files.values())
        cells = {slot: (sample.token_index, sample.prompt_length) for slot, sample in samples.items()}
        for name, data in derived_chunks(self.layout, commit, cells).items():
            write_atomic(self.path / name, data)
