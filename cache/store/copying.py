"""Copies: samples of committed captures, all of them or a part, written into another capture.

Selecting, merging and compacting are this. A copy that was interrupted goes on where it stopped, as any writing does.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import BadInputError, StoreError, UnknownNameError
from hiddenlake.cache.samples import Failure, Sample
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.coverage import DTYPES, Coverage
from hiddenlake.cache.store.labels import merge_labels, write_label
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.sizes import choose_layout
from hiddenlake.cache.store.snapshot import Snapshot
from hiddenlake.cache.store.writer import Writer, open_writer

if TYPE_CHECKING:
    import pyarrow

Progress = Callable[[int, int], None]

# Of activations in memory at once, beside the writer's buffers.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One capture, and the rows of it in task order that are copied."""

    capture: Capture
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied.

    identity, coverage, codec : of the copy.
    bytes : what its activations take, before any codec.
    """

    sources: tuple[Source, ...]
    identity: dict[str, Any]
    coverage: Coverage
    codec: str
    bytes: int

    @property
    def samples(self) -> int:
        return sum(len(source.rows) for source in self.sources)

    def check_space(self, out: Backend) -> None:
        """Raise StoreError when the disk cannot hold the copy."""
        if isinstance(out, LocalBackend):
            folder = out.path.absolute()
            while not folder.exists():
                folder = folder.parent
            free = shutil.disk_usage(folder).free
            if self.bytes > free:
                raise StoreError(
                    f"{out}: the copy takes up to {self.bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: free some "
                    f"space, or copy fewer samples, sites, layers or positions"
                )


def plan_select(
    capture: Capture,
    *,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[str] | None = None,
    samples: Iterable[str | int] | None = None,
    tokens: bool = True,
    codec: str | None = None,
) -> Plan:
    """A part of one capture.

    sites, layers, positions : of the coverage, or None for all of them; () for no positions.
    samples : keys, or rows in task order, or None for all.
    tokens : whether token-level data are copied, where there are any.
    codec : of the copy; None for the capture's own.

    Raises UnknownNameError for what the capture does not hold; BadInputError where nothing would be left, or a lossy
    capture would lose a second time.
    """
    c = capture.coverage
    chosen = {
        "sites": _chosen(capture, "site", sites, c.sites),
        "layers": _chosen(capture, "layer", layers, c.layers),
        "positions": _chosen(capture, "position", positions, c.positions),
    }
    try:
        widths = {site: c.widths[site] for site in ("embed", *chosen["sites"])}
        coverage = replace(c, **chosen, widths=widths, tokens=c.tokens if tokens else None)
    except ValueError as error:
        raise BadInputError(f"{capture.path}: nothing would be left to copy ({error})") from error
    rows, _ = capture.rows(samples)
    return _plan([Source(capture, np.unique(rows))], capture.identity, coverage, codec)


def plan_merge(captures: Sequence[Capture], codec: str | None = None) -> Plan:
    """All samples of several captures of one identity and one coverage.

    Raises IdentityError where they differ, naming the fields, and BadInputError where a sample is in two of them.
    """
    if not captures:
        raise BadInputError("nothing to merge: name at least one capture")
    first = captures[0]
    where: dict[str, str] = {}
    for capture in captures:
        capture.snapshot.root.check(capture.place, first.identity, first.coverage)
        for key in capture.keys:
            if key in where:
                raise BadInputError(
                    f"sample {key} is in {where[key]} and in {capture.path}: a key is stored once; select the others first"
                )
            where[key] = capture.path
    sources = [Source(capture, np.arange(len(capture))) for capture in captures]
    return _plan(sources, first.identity, first.coverage, codec)


def _plan(sources: Sequence[Source], identity: dict[str, Any], coverage: Coverage, codec: str | None) -> Plan:
    for source in sources:
        if source.capture.codec == "fp8" and codec in (None, "fp8"):
            raise BadInputError(
                f"{source.capture.path} is stored as fp8: a copy in fp8 would lose a second time; name the codec `none` or "
                f"`zstd`, which keeps what is there"
            )
    codec = codec or sources[0].capture.codec
    if codec == "fp8" and "stored_dtype" in identity:
        identity = identity | {"stored_dtype": "float8_e4m3fn"}
    size = DTYPES[coverage.dtype][0].itemsize
    elements = sum(
        width * (len(coverage.layers) if SITES[site].layered else 1) for site, width in coverage.widths.items()
    )
    tokens = 0
    if coverage.tokens:
        tokens = sum(int(source.capture.snapshot.token_length[source.rows].sum()) for source in sources)
    cells = sum(len(source.rows) for source in sources) * len(coverage.positions)
    return Plan(tuple(sources), identity, coverage, codec, (cells + tokens) * elements * size)


def _chosen(capture: Capture, what: str, wanted: Sequence[Any] | None, known: tuple[Any, ...]) -> tuple[Any, ...]:
    """In the capture's order."""
    if wanted is None:
        return known
    names = [str(name) if what == "position" else name for name in wanted]
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"{capture.path} has no {what} {name!r}: it has {', '.join(map(str, known)) or 'none'}"
            )
    return tuple(name for name in known if name in names)


def copy(
    plan: Plan,
    out: Backend,
    *,
    shard_samples: int | None = None,
    buffer_bytes: int = 2 << 30,
    progress: Progress | None = None,
) -> int:
    """Write what was planned into `out`, with labels and failures. Returns how many samples were copied now.

    progress : called with (samples copied, samples in all).

    Raises what reading and writing do: IdentityError where `out` holds something else.
    """
    plan.check_space(out)
    labels = merge_labels([source.capture for source in plan.sources], _keys(plan))
    done = 0
    with open_writer(
        out,
        identity=plan.identity,
        coverage=plan.coverage,
        provenance={"copied_from": [_origin(source.capture) for source in plan.sources]},
        planned=plan.samples,
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples or min(choose_rows(plan), max(1, plan.samples)),
        codec=plan.codec,
    ) as writer:
        seen = 0
        for source in plan.sources:
            table = source.capture.samples().take(source.rows)
            for block in _blocks(plan, source, writer.shard_samples):
                part = table.slice(block.start, len(block))
                done += copy_samples(writer, source.capture.snapshot, source.rows[block], part)
                seen += len(block)
                if progress is not None:
                    progress(seen, plan.samples)
            for failure in source.capture.failures().to_pylist():
                cause = failure["cause"]
                writer.fail(Failure(failure["key"], failure["index"], cause, failure["attempts"]))
        writer.flush()
        for name, label in labels.items():
            write_label(writer.place, name, label)
    return done


def choose_rows(plan: Plan) -> int:
    """Samples a shard that reads are fastest with."""
    return choose_layout(plan.coverage, plan.samples, 2 << 30, codec=plan.codec).samples


def _keys(plan: Plan) -> list[str]:
    return [key for source in plan.sources for key in source.capture.snapshot.keys[source.rows]]


def _origin(capture: Capture) -> dict[str, Any]:
    distinct: list[dict[str, Any]] = []
    for commit in capture.commits:
        if commit.provenance and commit.provenance not in distinct:
            distinct.append(commit.provenance)
    return {"path": capture.path, "provenance": distinct}


def _blocks(plan: Plan, source: Source, shard_samples: int) -> Iterable[range]:
    """Samples that are read together: as many as fit, so that chunks are read once."""
    most = max(1, min(shard_samples, _BLOCK_BYTES * max(1, plan.samples) // max(1, plan.bytes)))
    for start in range(0, len(source.rows), most):
        yield range(start, min(start + most, len(source.rows)))


def copy_samples(
    writer: Writer, snapshot: Snapshot, rows: np.ndarray, table: "pyarrow.Table", single: bool = False
) -> int:
    """Copy samples that are not there yet, which fit in memory together. Returns how many.

    table : their rows of samples/.  single : whether rows are read by themselves also where chunks would be faster.
    """
    keys = snapshot.keys[rows].tolist()
    wanted = set(writer.reserve(keys, len(keys)))
    here = np.array([key in wanted for key in keys], bool)
    rows, records = rows[here], [record for record, one in zip(table.to_pylist(), here, strict=True) if one]
    if not len(rows):
        return 0
    c, theirs = writer.coverage, snapshot.layout.coverage
    columns = [theirs.positions.index(position) for position in c.positions]
    layers = [theirs.layers.index(layer) for layer in c.layers]
    cells, tokens, lengths = {}, {}, snapshot.token_length[rows]
    for site in c.widths:
        outer = [layers] if SITES[site].layered else []
        if columns:
            block = snapshot.read_cells(site, [*outer, columns], rows, "stored", single=single)
            cells[site] = block.view(DTYPES[c.dtype][0])
        if c.tokens:
            starts = snapshot.token_offsets[rows]
            places = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
            block = snapshot.read_tokens(site, outer, places.astype(np.int64), "stored", single=single)
            tokens[site] = block.view(DTYPES[c.dtype][0])
    ends = np.cumsum(lengths)
    for i, record in enumerate(records):
        shard, slot = writer.slot()
        span = None
        if c.tokens:
            span = writer.span(int(lengths[i]))
            while span.rest:
                piece = writer.piece(span)
                start = int(ends[i] - lengths[i]) + piece.first
                for site, view in piece.shard.views.items():
                    view[..., piece.rows, :] = tokens[site][..., start : start + piece.count, :]
                writer.filled(piece)
        for site, view in shard.views.items():
            view[..., slot, :] = cells[site][..., i, :]
        writer.add(shard, slot, _sample(record, columns), span)
    return len(records)


def _sample(record: dict[str, Any], columns: Sequence[int]) -> Sample:
    """A row of samples/, with the positions of the copy."""
    fields = {name: record[name] for name in Sample.__dataclass_fields__}
    for name in ("answers", "token_ids", "logprobs"):
        fields[name] = tuple(fields[name])
    fields["token_index"] = tuple(record["token_index"][column] for column in columns)
    return Sample(**fields)
