"""Importing: other tools' activations as a capture, sample by sample, each complete or not there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import hiddenlake
from hiddenlake.cache.errors import BadInputError, CaptureError, StoreError
from hiddenlake.cache.exchange.cost import Cost, Watcher, disk_free
from hiddenlake.cache.exchange.records import check_identity, complete_identity
from hiddenlake.cache.positions import ABSENT
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.store.coverage import DTYPES, EMBED, Coverage
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.writer import Writer, open_writer

# Samples that are reserved at a time: several imports of one source may run at once.
_RESERVED = 256

# Bytes of token rows that are read at a time.
BLOCK_BYTES = 32 << 20

# (done, total) of what a source checks when it is made
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


class Source(Protocol):
    """Another tool's activations, all headers of which were checked.

    format : goes to identity and provenance.
    coverage : of the capture that they make.
    keys : of the samples, in task order; a sample's number is its place there.
    missing : samples whose activations are not there at all, with the cause; their keys are not in `keys`.
    compute_dtype : of the model, which the identity must name too; None where the source does not depend on it.
    elements : of all cells and token rows.
    files : that are read.
    note : is said before the start.
    identity : where the source has one of its own.
    provenance : what is known of where it came from, as plain JSON.
    """

    format: str
    coverage: Coverage
    keys: Sequence[str]
    missing: Sequence[Failure]
    compute_dtype: str | None
    elements: int
    files: int
    note: str
    identity: Mapping[str, Any] | None
    provenance: Mapping[str, Any]

    def sample(self, number: int) -> Sample:
        """The sample. Raises BadInputError."""

    def cells(self, number: int, sample: Sample) -> Mapping[str, np.ndarray]:
        """site -> stored bits, (layer, position, width), or (position, width). Raises BadInputError."""

    def tokens(self, number: int, sample: Sample, first: int, count: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Stored bits of the stored tokens from `first` on, in blocks of (layer, token, width), or (token, width).

        Raises BadInputError.
        """

    def token_count(self, number: int, sample: Sample) -> int:
        """Stored tokens of the sample."""


@dataclass(slots=True)
class Imported:
    """What an import did.

    present : samples that were there before.  elsewhere : that another process imports meanwhile.
    causes : key -> why it was not imported.  bytes : of the files that were written.
    """

    path: str
    format: str
    imported: int = 0
    present: int = 0
    failed: int = 0
    elsewhere: int = 0
    bytes: int = 0
    causes: dict[str, str] = field(default_factory=dict)


def import_source(
    source: Source,
    out: str | Path,
    identity: Mapping[str, Any] | None = None,
    *,
    buffer_bytes: int = 1 << 30,
    shard_samples: int | None = None,
    watcher: Watcher | None = None,
) -> Imported:
    """Write a source's samples into a new capture, or go on with an import of it that was interrupted.

    identity : see `records.check_identity`, None where the source has one; `imported` is added to it, so that no captured sample is taken for one.
    buffer_bytes, shard_samples : see `open_writer`.

    A sample that is not complete, not finite or not what its header said is left out and recorded with its cause.
    Ctrl-C keeps what is complete; the capture then has fewer samples than it was planned for, and the same call goes on.

    Raises IdentityError for a capture of another identity or coverage; StoreError where `out` is anything but an
    unfinished import of the same source, or the disk is full; BadInputError for an identity that lacks something.
    """
    watcher = watcher or Watcher()
    if (identity is None) == (source.identity is None):
        raise BadInputError("the identity is to be given, except for a source that has one of its own")
    if identity is not None:
        check_identity(identity)
    facts = complete_identity(source.identity or identity, source.coverage.dtype, source.format)
    if source.compute_dtype not in (None, facts.get("compute_dtype")):
        raise BadInputError(
            f"the identity says compute_dtype {facts['compute_dtype']}, the source {source.compute_dtype}"
        )
    wanted = len(source.keys) + len(source.missing)
    present = _present(out, source)
    result = Imported(str(out), source.format, present=len(present))
    bytes_ = source.elements * DTYPES[source.coverage.dtype][0].itemsize
    if source.keys:
        bytes_ = bytes_ * (len(source.keys) - len(present)) // len(source.keys)
    cost = Cost(
        samples=len(source.keys) - len(present),
        files=source.files,
        data_bytes=bytes_,
        table_bytes=0,
        memory_bytes=buffer_bytes + 4 * BLOCK_BYTES,
        # nobody knows how much a bucket holds
        disk_free=None if "://" in str(out) else disk_free(Path(out)),
        note="; ".join(filter(None, [source.note, present and f"{len(present)} samples are there already"])),
    )
    cost.check()
    watcher.planned(cost)
    with open_writer(
        out,
        identity=facts,
        coverage=source.coverage,
        provenance={"imported": {"format": source.format, "hiddenlake": hiddenlake.__version__, **source.provenance}},
        planned=wanted,
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples,
    ) as writer:
        for failure in source.missing:
            writer.fail(failure)
            result.causes[failure.key] = failure.cause
        _write_all(source, writer, result, bytes_, watcher)
        writer.flush()
        result.bytes = writer.bytes_written
    result.failed = len(result.causes)
    result.elsewhere = wanted - result.present - result.imported - result.failed
    return result


def _present(out: str | Path, source: Source) -> set[str]:
    """Keys that an unfinished import of the source left. Raises StoreError for anything else that is there.

    What is there already must be the same samples: each has the token ids that the source has under its key.
    """
    try:
        capture = open_capture(out)
    except StoreError:
        # `open_writer` refuses what is there and is no capture
        return set()
    if "imported" not in capture.provenance:
        raise StoreError(f"{out} is a capture that was not imported: name another folder")
    numbers = {key: number for number, key in enumerate(source.keys)}
    table = capture.samples().select(["key", "checksum"])
    for key, checksum in zip(table["key"].to_pylist(), table["checksum"].to_pylist(), strict=True):
        if key not in numbers:
            raise StoreError(f"{out} holds a sample {key!r} that this source does not have: name another folder")
        if source.sample(numbers[key]).checksum != checksum:
            raise StoreError(f"{out} holds other token ids for {key!r} than this source: name another folder")
    if len(capture) == len(numbers):
        raise StoreError(f"{out} exists already and holds all {len(capture)} samples: name another folder")
    return set(capture.keys)


def _write_all(source: Source, writer: Writer, result: Imported, total: int, watcher: Watcher) -> None:
    numbers = {key: number for number, key in enumerate(source.keys)}
    count = len(source.keys) - result.present
    rest = source.keys
    while chosen := writer.reserve(rest, _RESERVED):
        # what was passed over is there, or another process's
        rest = source.keys[numbers[chosen[-1]] + 1 :]
        for key in chosen:
            number = numbers[key]
            index = number
            try:
                sample = source.sample(number)
                index = sample.index
                _write(source, writer, number, sample)
                result.imported += 1
            except (BadInputError, CaptureError) as error:
                writer.fail(Failure(key, index, str(error), 1))
                result.causes[key] = str(error)
            done = result.imported + len(result.causes) - len(source.missing)
            watcher.progressed(total * done // max(1, count), total)


def _write(source: Source, writer: Writer, number: int, sample: Sample) -> None:
    """Write one sample. Raises BadInputError or CaptureError, and then nothing of it stays."""
    shard, slot = writer.slot()
    span = None
    try:
        present = np.array(sample.token_index) != ABSENT
        if writer.coverage.positions:
            cells = source.cells(number, sample)
            for site, view in shard.views.items():
                view[..., present, slot, :] = cells[site][..., present, :]
        if writer.coverage.tokens:
            span = writer.span(source.token_count(number, sample))
            while span.rest:
                piece = writer.piece(span)
                if piece is None:
                    raise RuntimeError("a token buffer is not free, though no other sample is being written")
                row = piece.row
                for block in source.tokens(number, sample, piece.first, piece.count):
                    for site, view in piece.shard.views.items():
                        view[..., row : row + block[site].shape[-2], :] = block[site]
                    row += len(block[EMBED])
                if row != piece.row + piece.count:
                    raise BadInputError(f"{sample.key}: {row - piece.row} of {piece.count} tokens were read")
                writer.filled(piece)
        writer.add(shard, slot, sample, span)
    except (BadInputError, CaptureError):
        writer.release(shard, slot, span)
        raise
    except ValueError as error:
        # the sample does not fit the coverage
        writer.release(shard, slot, span)
        raise BadInputError(f"{sample.key}: {error}") from error
