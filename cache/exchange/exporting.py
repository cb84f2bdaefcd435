"""Exporting: a capture as a folder that other tools read, complete or not there."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.exchange.cost import Cost, Watcher, disk_free
from hiddenlake.cache.exchange.index import index_table, write_index
from hiddenlake.cache.exchange.plan import Plan
from hiddenlake.cache.exchange.selection import Selection, select
from hiddenlake.cache.exchange.target import building, check_absent
from hiddenlake.cache.store.reader import Capture, open_capture

FORMATS = ("safetensors", "datasets", "npy", "torch")

# Large enough that 70B and 100,000 samples are some thousands of files, small enough to be fetched again when one broke.
SHARD_BYTES = 1 << 30
MEMORY_BYTES = 1 << 30
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote. bytes : of all files, the manifest left out."""

    path: str
    format: str
    samples: int
    files: int
    bytes: int


def export_capture(
    capture: Capture | str | Path,
    out: str | Path,
    format: str = "safetensors",
    *,
    sites: Iterable[str] | None = None,
    layers: str | Iterable[int] | None = None,
    positions: str | Iterable[str | int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    watcher: Watcher | None = None,
) -> Exported:
    """Write a capture's committed samples, checked as they are read, into a new folder.

    out : must not exist. It appears when everything is written and durable; Ctrl-C or an error leaves nothing.
    format : `safetensors`, `datasets`, `npy` or `torch`; each module's docstring has its layout.
    sites, layers, positions : what of the capture; None for all, `embed` included. `all`, `all_generated/8`, ...,
        as the capture has it, stands for its token-level activations.
    shard_bytes : largest file, where the format has several a site.
    memory_bytes : that activations may take at a time; the samples' table comes on top.

    Raises UnknownNameError for what was not captured; BadInputError where a sample does not fit in the memory, or a
    library is missing; CorruptError where the capture is damaged; StoreError where `out` exists or the disk is full.
    """
    if format not in FORMATS:
        raise UnknownNameError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if shard_bytes < 1 or memory_bytes < 1:
        raise BadInputError(f"shard_bytes {shard_bytes} and memory_bytes {memory_bytes}: expected 1 or more")
    out, watcher = Path(out), watcher or Watcher()
    check_absent(out)
    selection = select(capture if isinstance(capture, Capture) else open_capture(capture), sites, layers, positions)
    plan = _plan(format, selection, shard_bytes, memory_bytes)
    cost = Cost(
        samples=len(selection),
        files=plan.files,
        data_bytes=plan.data_bytes,
        table_bytes=selection.samples.nbytes,
        memory_bytes=plan.memory_bytes + 2 * selection.samples.nbytes,
        disk_free=disk_free(out),
        note=plan.note,
    )
    cost.check()
    watcher.planned(cost)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        watcher.progressed(done, plan.data_bytes)

    with building(out, _facts(selection) | plan.facts) as target:
        # The small table first: labels that cannot stand in it are found out before the long work.
        if plan.index is not None:
            write_index(target, plan.index, index_table(selection, plan.places))
        if plan.card is not None:
            target.write("README.md", plan.card.encode())
        plan.write(target, progress)
        files = target.files
    return Exported(str(out), format, len(selection), len(files), sum(file["bytes"] for file in files.values()))


def _plan(format: str, selection: Selection, shard_bytes: int, memory_bytes: int) -> Plan:
    from importlib import import_module

    module = import_module(f"hiddenlake.cache.exchange.{format}")
    return module.plan(selection, shard_bytes, memory_bytes)


def _facts(selection: Selection) -> dict[str, Any]:
    """What the manifest says of the activations, whatever the format."""
    return {
        "hiddenlake_export": _VERSION,
        "identity": selection.capture.identity,
        "provenance": selection.capture.provenance,
        "samples": len(selection),
        "sites": {part.site: part.width for part in selection.parts},
        "layers": sorted({part.layer for part in selection.parts if part.layer is not None}),
        "positions": list(selection.positions),
        "tokens": None if selection.tokens is None else str(selection.tokens),
        "codec": selection.capture.codec,
        "losses": {name: asdict(loss) for name, loss in selection.capture.losses().items()},
    }
