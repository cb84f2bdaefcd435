"""The writer: samples in, committed shards out. Several processes may write one capture."""

import heapq
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from hiddenlake.cache.errors import BadInputError, CaptureError, StoreError
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.store import claims as _claims
from hiddenlake.cache.store import layout as _layout
from hiddenlake.cache.store.claims import Claims
from hiddenlake.cache.store.commits import Commit, FileRecord, list_commits, read_commit
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.derived import derived_chunks, rebuild
from hiddenlake.cache.store.files import crc32c, create_folder, write_atomic
from hiddenlake.cache.store.layout import BUFFERS, Layout, check_buffers, encode_numbers
from hiddenlake.cache.store.root import Root, read_root
from hiddenlake.cache.store.shard import Shard, ShardBuffer
from hiddenlake.cache.store.tables import encode_failures, encode_samples

# A run in which everything fails must not rewrite its list of failures for each.
_FAILURES_SECONDS = 1.0


def open_writer(
    path: str | Path,
    *,
    identity: dict[str, Any],
    coverage: Coverage,
    provenance: dict[str, Any],
    planned: int,
    buffer_bytes: int = 2 << 30,
    shard_samples: int | None = None,
) -> "Writer":
    """Create a capture, or open it to write more of it. Leftovers of dead writers are removed first.

    identity : what makes two activations the same numbers; plain JSON, compared field by field.
    provenance : engine, versions, hardware: plain JSON, kept with each commit.
    planned : samples of the whole run; the sample axis is made for them and grows when it must.
    buffer_bytes : memory that the two shard buffers may take.
    shard_samples : B, where it should not be chosen by `layout.shard_samples`; an existing capture keeps its own.

    Raises IdentityError where the folder holds another identity or coverage, StoreError where it is
    not empty and no capture, of an unknown version, or the buffers do not fit.
    """
    path = Path(path)
    identity, provenance = _plain("identity", identity), _plain("provenance", provenance)
    if planned < 0 or (shard_samples is not None and shard_samples < 1):
        raise ValueError(f"planned {planned} and shard_samples {shard_samples}: expected 0 or more, and 1 or more")
    if not (path / "zarr.json").exists():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(f"{path} is not empty and is no capture: name another folder, or empty it")
        samples = shard_samples or _layout.shard_samples(coverage, planned, buffer_bytes)
        root = Root(identity, coverage, samples, planned, provenance, max(1, -(-planned // samples)))
        check_buffers(root.layout, buffer_bytes)
        files = root.files() | root.layout.coordinates()
        # When another process was faster, its capture is opened, and checked, like any other.
        create_folder(path, files, root.layout.folders(), _claims.LOCK)
    root = read_root(path)
    root.check(path, identity, coverage)
    check_buffers(root.layout, buffer_bytes)
    return Writer(path, root, provenance)


@dataclass(slots=True)
class _Filling:
    """A claimed shard between its claim and its publishing."""

    shard: Shard
    free: list[int]
    handed_out: set[int] = field(default_factory=set)
    samples: dict[int, Sample] = field(default_factory=dict)


class Writer:
    """One process's hand on a capture; made by `open_writer`. Its methods may be called from several threads.

    path : the capture's folder.
    committed : keys of all committed samples, of all writers, as of the last `reserve`. Not to be changed.
    published : samples that this writer committed.
    bytes_written : bytes of the files that this writer published.
    provenance : kept with each commit; may be set again, e.g. once an engine has started.
    """

    def __init__(self, path: Path, root: Root, provenance: dict[str, Any]) -> None:
        self.path = path
        self.coverage = root.coverage
        self.layout: Layout = root.layout
        self.committed: set[str] = set()
        self.published = 0
        self.bytes_written = 0
        self.provenance = provenance
        self._lock = threading.RLock()
        self._commits: dict[int, Commit] = {}
        self._reserved: set[str] = set()
        self._added: set[str] = set()
        self._filling: list[_Filling] = []
        self._buffers: list[ShardBuffer] = []
        self._idle: list[ShardBuffer] = []
        self._publishing: list[Future[None]] = []
        self._error: BaseException | None = None
        self._raised = False
        self._closed = False
        self._left = False
        self._failures: dict[str, tuple[Failure, datetime]] = {}
        self._failures_written = (0, -_FAILURES_SECONDS)
        self._claims: Claims = _claims.enter(path, self.layout)
        try:
            with self._claims.lock():
                self._refresh()
                self._claims.sweep()
                # Another process may have grown the sample axis since the root was read.
                rebuild(path, read_root(path), list(self._commits.values()))
        except BaseException:
            self._claims.leave()
            raise
        self._publisher = ThreadPoolExecutor(1, "hiddenlake-publisher")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def shard_samples(self) -> int:
        """B."""
        return self.layout.samples

    def reserve(self, keys: Sequence[str], limit: int) -> list[str]:
        """The next samples to work on: up to `limit` of `keys`, in their order.

        Left out are keys that are committed, that another living writer reserved, and that this writer
        reserved before. Processes that run the same command on one capture split the work this way.
        """
        with self._lock:
            self._check()
            with self._claims.lock():
                self._refresh()
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
        """A free slot: the sample's rows go to `shard.views[site][..., slot, :]`, then call `add` or `release`.

        Blocks while both shard buffers are being published. Raises StoreError when all slots of both
        are handed out.
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
                publishing = list(self._publishing)
            if not publishing:
                raise StoreError(
                    f"all {BUFFERS * self.layout.samples} slots of both shard buffers are handed out: add or release "
                    f"some before asking for more, or open the capture with more buffer memory"
                )
            wait(publishing, return_when=FIRST_COMPLETED)

    def add(self, shard: Shard, slot: int, sample: Sample) -> None:
        """The slot's rows are complete: the sample will be committed with its shard.

        The shard is published in the background once all its slots are added. Acknowledged is what
        `published` counts or `flush` returned for; anything else is captured again after a crash.

        Raises CaptureError where a cell whose token is present is not finite, or one that is absent is not
        NaN; the slot is then still handed out, to be filled again or released.
        """
        self.coverage.check_token_index(sample.token_index, sample.total_length)
        with self._lock:
            self._check()
            filling = self._filling_of(shard, slot)
            if sample.key not in self._reserved:
                raise StoreError(f"sample {sample.key} was not reserved by this writer: call `reserve` first")
            if sample.key in self._added or sample.key in self.committed:
                raise StoreError(f"sample {sample.key} was added before: a key is stored once")
        # Here and not when the shard is published: here it overlaps with the writing of the shard before.
        rows = shard.buffer.rows(slot)
        self._check_cells(rows, sample)
        shard.buffer.finish(slot, rows)
        with self._lock:
            if sample.key in self._added:
                raise StoreError(f"sample {sample.key} was added before: a key is stored once")
            filling.handed_out.remove(slot)
            filling.samples[slot] = sample
            self._added.add(sample.key)
            self._failures.pop(sample.key, None)
            if len(filling.samples) == self.layout.samples:
                self._publish(filling)

    def release(self, shard: Shard, slot: int) -> None:
        """Give a slot back unused. Whatever was written into it is forgotten."""
        with self._lock:
            filling = self._filling_of(shard, slot)
            filling.handed_out.remove(slot)
            heapq.heappush(filling.free, slot)

    def fail(self, failure: Failure) -> None:
        """Record a sample that could not be captured. It is tried again by the next run."""
        with self._lock:
            self._check()
            self._failures[failure.key] = failure, datetime.now(UTC)
            self._write_failures(at_most_once_a_second=True)

    def flush(self) -> None:
        """Publish what was added, in shards that keep free slots, and wait until all is committed.

        Raises StoreError when slots are still handed out, or publishing failed.
        """
        with self._lock:
            self._check()
            handed_out = sum(len(filling.handed_out) for filling in self._filling)
            if handed_out:
                raise StoreError(f"{handed_out} slots are still handed out: add or release them before a flush")
            for filling in [filling for filling in self._filling if filling.samples]:
                self._publish(filling)
            publishing = list(self._publishing)
        wait(publishing)
        with self._lock:
            self._check()
            self._write_failures()

    def close(self) -> None:
        """Publish what was added, forget slots that are still handed out, and leave. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if not self._raised:
                for filling in list(self._filling):
                    for slot in list(filling.handed_out):
                        self.release(filling.shard, slot)
                self.flush()
        finally:
            self._publisher.shutdown(wait=True)
            self._left = True
            self._claims.leave()
            for buffer in self._buffers:
                buffer.close()

    def _check(self) -> None:
        """Raise what went wrong in the background; from then on this writer only refuses."""
        if self._left:
            raise StoreError(f"this writer of {self.path} is closed: open another one")
        for future in [future for future in self._publishing if future.done()]:
            self._publishing.remove(future)
            self._error = self._error or future.exception()
        if self._error is not None:
            self._raised = True
            raise StoreError(f"publishing to {self.path} failed: {self._error}") from self._error

    def _refresh(self) -> None:
        for shard in list_commits(self.path) - self._commits.keys():
            self._remember(read_commit(self.path, shard))

    def _remember(self, commit: Commit) -> None:
        self._commits[commit.shard] = commit
        self.committed.update(key for key in commit.keys if key is not None)

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
            self._buffers.append(ShardBuffer(self.layout))
            self._idle.append(self._buffers[-1])
        with self._claims.lock():
            number, fencing = self._claims.claim()
            root = read_root(self.path)
            if number >= root.shards:
                self._grow(root, number)
        filling = _Filling(Shard(number, fencing, self._idle.pop()), list(range(self.layout.samples)))
        self._filling.append(filling)
        return filling

    def _grow(self, root: Root, shard: int) -> None:
        """Lengthen the sample axis: arrays first, the consolidated root last. Under the capture's lock."""
        # By an eighth, so that a run of unplanned length rewrites its metadata a few times only.
        shards = max(shard + 1, root.shards + root.shards // 8)
        grown = Root(root.identity, root.coverage, root.shard_samples, root.planned, root.provenance, shards)
        for name, data in grown.files().items():
            write_atomic(self.path / name, data)

    def _check_cells(self, rows: dict[str, np.ndarray], sample: Sample) -> None:
        present = np.asarray(sample.token_index) != ABSENT
        for site, bits in rows.items():
            if bits.dtype == np.uint16:
                # bfloat16 has the exponent of float32: all ones means infinite or NaN.
                bad = (bits & np.uint16(0x7F80)) == 0x7F80
                nan = bad & ((bits & np.uint16(0x007F)) != 0) if not present.all() else bad
            else:
                bad, nan = ~np.isfinite(bits), np.isnan(bits)
            wrong = np.where(present, bad.any(-1), ~nan.all(-1))
            if wrong.any():
                cell = [int(axis[0]) for axis in np.nonzero(wrong)]
                layer = f"layer {self.coverage.layers[cell[0]]}, " if len(cell) == 2 else ""
                found = "not finite" if present[cell[-1]] else "there, though its token is absent"
                raise CaptureError(
                    f"sample {sample.key}: {site}, {layer}position {self.coverage.positions[cell[-1]]} is {found} "
                    f"({int(wrong.sum())} of {wrong.size} cells): the sample is not stored; capture it again"
                )

    def _publish(self, filling: _Filling) -> None:
        self._filling.remove(filling)
        self._publishing.append(self._publisher.submit(self._write_shard, filling))

    def _write_shard(self, filling: _Filling) -> None:
        """In the publisher's thread: data, row checksums, samples; then the commit; then what is derived from them."""
        if self._error is not None:
            return
        try:
            shard, samples = filling.shard, filling.samples
            k, slots = shard.number, sorted(samples)
            if self._claims.read(k) != (self._claims.writer, shard.fencing):
                raise StoreError(
                    f"{self.path}: the claim on shard {k} is no longer ours: these samples were not stored; "
                    f"run the same command again"
                )
            for slot in set(range(self.layout.samples)) - samples.keys():
                shard.buffer.clear(slot)
            files = {}
            for site, whole in shard.buffer.seal().items():
                name = self.layout.data_file(site, k)
                image = shard.buffer.images[site]
                write_atomic(self.path / name, image, preallocate=True)
                files[name] = FileRecord(len(image), whole)
                name = self.layout.row_crc_file(site, k)
                data = encode_numbers(shard.buffer.checksums[site])
                write_atomic(self.path / name, data)
                files[name] = FileRecord(len(data), crc32c(data))
            data = encode_samples(samples)
            write_atomic(self.path / self.layout.samples_file(k), data)
            files[self.layout.samples_file(k)] = FileRecord(len(data), crc32c(data))
            every = range(self.layout.samples)
            commit = Commit(
                k,
                self._claims.writer,
                shard.fencing,
                self.provenance,
                tuple(samples[slot].key if slot in samples else None for slot in every),
                tuple((samples[s].index, samples[s].sample_index) if s in samples else None for s in every),
                files,
                datetime.now(UTC).isoformat(timespec="seconds"),
            )
            commit.publish(self.path)
            with self._lock:
                self._remember(commit)
                self.published += len(samples)
                self.bytes_written += sum(record.size for record in files.values())
            rows = [samples[slot] for slot in slots]
            derived = derived_chunks(
                self.layout,
                k,
                slots,
                [sample.key for sample in rows],
                [sample.token_index for sample in rows],
                [sample.prompt_length for sample in rows],
            )
            for name, data in derived.items():
                write_atomic(self.path / name, data)
            with self._lock:
                self._idle.append(shard.buffer)
        except BaseException as error:
            # Known here at once, so that a shard that waits behind this one is not written.
            self._error = error
            raise

    def _write_failures(self, at_most_once_a_second: bool = False) -> None:
        count, when = self._failures_written
        if at_most_once_a_second and time.monotonic() - when < _FAILURES_SECONDS:
            return
        if self._failures or count:
            data = encode_failures(self._failures.values())
            write_atomic(self.path / "failures" / f"{self._claims.writer}.parquet", data)
        self._failures_written = len(self._failures), time.monotonic()


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back, so that comparing it with a stored one is comparing like with like."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{name} is not plain JSON ({error}): use strings, numbers, lists and dicts") from error
