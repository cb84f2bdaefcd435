"""What the store costs, beside plain files and other stores.

    python benchmarks/store.py [--quick] [--json FILE] [--rivals NAME,...] [--hidden 576,4096]

The same activations, over 4 GB of bfloat16 (--quick: over 0.5 GB), at 576 and 4096 hidden: written from an engine's
rows, sample by sample, until they are durable; and read back, warm and cold, as probes and people do. Every store runs
in a process of its own; rounds go through all of them in rotated order. A ratio is of bytes of activations a second,
ours over theirs, in the same round. Every store shows in every round that it read what was written. Warm means that the
store's files have been read from their beginning to their end before, and cold that they were thrown out of this machine's
page cache, and are opened anew; a virtual disk may have a cache of its own.
"""

import argparse
import inspect
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from _disk import disk
from _environments import pinned
from _store_bench import Case, Reads, StoreBench, Writes
from _stores import (
    CELL,
    COLUMN,
    CONTIGUOUS,
    DIRECT,
    FULL,
    KINDS,
    OURS,
    QUICK,
    RIVALS,
    SAMPLE,
    SHARDS,
    SHARED,
    SHUFFLED,
    SIZES,
    SLAB,
    Kind,
    Store,
)
from _table import Row, compare, machine, print_table, write_json

from hiddenlake.cache.model import cache_folder
from hiddenlake.cache.store import Capture

# What a write may take beside its two shard buffers: samples and their tables, Arrow's pool, the interpreter.
BESIDE_BUFFERS = 64 << 20

# Ours, the limit and one more store lie on the disk at a time.
_FOLDS = 3.3

LIMIT = (CONTIGUOUS, "into a buffer")
NEW_MEMORY = (CONTIGUOUS, "into new memory")
ANNOUNCED = (CONTIGUOUS, "announced")
CHECKED = (OURS, "checked")
UNCHECKED = (OURS, "unchecked")

# With a buffer of the caller's, where this version's `read` takes one.
_TAKES_OUT = "out" in inspect.signature(Capture.read).parameters
INTO_BUFFER = (OURS, "checked, into a buffer")
UNCHECKED_INTO_BUFFER = (OURS, "unchecked, into a buffer")
SHUFFLED_CHECKED = (SHUFFLED, "checked")
SHUFFLED_INTO_BUFFER = (SHUFFLED, "checked, into a buffer")


def write_limits(bench: StoreBench) -> list[Row]:
    """Ours beside plain files and TensorStore, and its memory."""
    tensorstore = RIVALS["tensorstore"]
    costs = bench.measure_writes((SHARDS, DIRECT, OURS, SHARED, tensorstore), bench.rounds.writes, warm_up=True)
    rows = [write_row(bench, costs, SHARDS, 0.95), write_row(bench, costs, SHARDS, 0.95, ours=SHARED)]
    rows.append(write_row(bench, costs, DIRECT, None))
    rows += [] if tensorstore in bench.failed else [write_row(bench, costs, tensorstore, 1.0)]
    allowed = bench.layout.buffer_bytes + BESIDE_BUFFERS
    peaks = costs[OURS].peak
    rows.append(
        compare(
            f"{bench.size.hidden}: peak memory of a write", "MiB", [peak / 2**20 for peak in peaks],
            [allowed / 2**20] * len(peaks), "two shard buffers and 64 MiB", goal=1.0, judged=bench.rounds.judged,
            note=f"a shard is {bench.layout.shard_bytes / 2**20:.0f} MiB",
            means="growth of the writing process's resident memory, shared memory included, at its peak",
        )
    )  # fmt: skip
    return rows


def write_rivals(bench: StoreBench, rivals: Sequence[Store]) -> list[Row]:
    """Ours beside all others, whose first write, before they were read, has warmed them up."""
    if not rivals:
        return []
    costs = bench.measure_writes((SHARDS, OURS, *rivals), bench.rounds.other_writes, warm_up=False)
    rows = []
    for rival in rivals:
        if rival in bench.failed:
            continue
        rows.append(write_row(bench, costs, rival, 1.0 if rival is RIVALS["tensorstore_plain"] else None))
        if not rival.fsyncs:
            rows.append(write_row(bench, costs, rival, None, shipped=True))
    return rows


def write_row(
    bench: StoreBench,
    costs: dict[Store, Writes],
    rival: Store,
    goal: float | None,
    *,
    shipped: bool = False,
    ours: Store = OURS,
) -> Row:
    """shipped : the rival's own end, without the fsync that it lacks."""
    case = f"{bench.size.hidden}: write" + (", in memory shared with other processes" if ours is SHARED else "")
    ours, theirs = costs[ours], costs[rival]
    rate = theirs.shipped if shipped else theirs.rate
    note = (
        f"CPU {np.median(ours.cpu):.2f}, {np.median(theirs.cpu):.2f} s/GB; disk {np.median(ours.bytes):.3f}, "
        f"{np.median(theirs.bytes):.3f}; memory {np.median(ours.peak) / 2**20:.0f}, "
        f"{np.median(theirs.peak) / 2**20:.0f} MiB{part(bench, rival)}"
    )
    name = rival.name
    if not rival.fsyncs:
        name += ", as shipped, not durable" if shipped else ", and fsync of its files"
    return compare(
        case, "MB/s", megabytes(ours.rate), megabytes(rate), name, goal=goal,
        less_is_better=False, judged=bench.rounds.judged, note=note,
    )  # fmt: skip


def read_limits(bench: StoreBench) -> list[Row]:
    """Ours, in all its ways, beside one contiguous read."""
    bench.write(SHUFFLED)
    rows = []
    bench.sweep(CONTIGUOUS, OURS, SHUFFLED)
    for cold, kind in product((False, True), KINDS):
        ours, limits = [CHECKED, *([INTO_BUFFER] if _TAKES_OUT else [])], [LIMIT]
        if kind is CELL:
            ours += [UNCHECKED, *([UNCHECKED_INTO_BUFFER] if _TAKES_OUT else [])]
            ours += [SHUFFLED_CHECKED, *([SHUFFLED_INTO_BUFFER] if _TAKES_OUT else [])]
            limits.append(ANNOUNCED if cold else NEW_MEMORY)
        found = bench.measure_reads([*limits, *ours], kind, cold, rounds_of(bench, kind, bench.rounds.reads))
        for limit in limits:
            for case in ours:
                rows.append(read_row(bench, found, kind, cold, case, limit, limit_goal(kind, cold, case, limit)))
    bench.delete(SHUFFLED)
    return rows


def limit_goal(kind: Kind, cold: bool, ours: Case, limit: Case) -> float | None:
    """What X[layer, position], its samples in the order in which they arrived, is to reach of one contiguous read."""
    if kind is not CELL or ours[0] is not OURS or limit == NEW_MEMORY:
        return None
    if cold:
        return 0.8 if ours[1].startswith("checked") else None
    return 0.6 if ours[1].startswith("checked") else 1.0


def read_rival(bench: StoreBench, rival: Store) -> list[Row]:
    """Ours beside another store, which lies on the disk only meanwhile; what there is where it cannot run."""
    if rival in bench.failed:
        return []
    tensorstore = rival in (RIVALS["tensorstore"], RIVALS["tensorstore_plain"])
    # like with like: ours is not checked beside TensorStore that does not check
    ours = UNCHECKED if rival is RIVALS["tensorstore_plain"] else CHECKED
    rows = []
    try:
        bench.write(rival)
        bench.sweep(OURS, rival)
        for cold, kind in product((False, True), KINDS):
            if kind is SLAB and not rival.slab:
                continue
            rounds = rounds_of(bench, kind, bench.rounds.reads if tensorstore else bench.rounds.other_reads)
            theirs = [(rival, way) for way in rival.ways]
            found = bench.measure_reads([ours, *theirs], kind, cold, rounds)
            # faster than every peer at one sample, and than TensorStore at a cell
            goal = 1.0 if kind in (COLUMN, SAMPLE) or (kind is CELL and tensorstore) else None
            rows += [read_row(bench, found, kind, cold, ours, case, goal) for case in theirs]
        bench.delete(rival)
    except RuntimeError as error:
        bench.leave_out(rival, error)
    return rows


def rounds_of(bench: StoreBench, kind: Kind, rounds: int) -> int:
    return bench.rounds.slabs if kind is SLAB else rounds


def read_row(
    bench: StoreBench, found: dict[Case, Reads], kind: Kind, cold: bool, ours: Case, rival: Case, goal: float | None
) -> Row:
    a, b = found[ours], found[rival]
    note = (
        f"{np.median(a.ms):.3g}, {np.median(b.ms):.3g} ms; CPU {np.median(a.cpu):.3g}, {np.median(b.cpu):.3g} ms"
        f"{part(bench, rival[0])}"
    )
    judged = bench.rounds.judged
    if cold:
        note += f"; disk {np.median(a.fetched):.3g}, {np.median(b.fetched):.3g}"
        # in half of the rounds, since an arm may open so much of a small file that little is left to be fetched
        if warm := [store.name for (store, _), of in ((ours, a), (rival, b)) if np.median(of.fetched) < 0.5]:
            judged, note = False, f"{note}: {' and '.join(warm)} was not cold"
    return compare(
        f"{bench.size.hidden}: {'cold' if cold else 'warm'} {kind.name}{_way(ours)}", "MB/s", megabytes(a.rate),
        megabytes(b.rate), rival[0].label(rival[1]), goal=goal, less_is_better=False, judged=judged, note=note,
    )  # fmt: skip


def _way(case: Case) -> str:
    store, way = case
    return f", {way}{', arrived in another order' if store is SHUFFLED else ''}"


def part(bench: StoreBench, store: Store) -> str:
    samples = store.samples(bench.samples)
    return "" if samples == bench.samples else f"; {samples:,} of {bench.samples:,} samples"


def megabytes(rates: Sequence[float]) -> list[float]:
    return [rate / 1e6 for rate in rates]


def measure(bench: StoreBench, rivals: Sequence[Store]) -> list[Row]:
    """All rows of one size."""
    rows = write_limits(bench)
    for store in (CONTIGUOUS, OURS):
        bench.write(store)
    rows += read_limits(bench)
    for rival in rivals:
        rows += read_rival(bench, rival)
    for store in (CONTIGUOUS, OURS):
        bench.delete(store)
    # TensorStore has been written beside the limits already
    rows += write_rivals(bench, [rival for rival in rivals if rival is not RIVALS["tensorstore"]])
    rows += [failed_row(bench, store) for store in bench.failed]
    bench.say("done")
    return rows


def failed_row(bench: StoreBench, store: Store) -> Row:
    """Why a store has no rows, or not all."""
    return Row(f"{bench.size.hidden}: left out", "", None, None, store.name, note=bench.failed[store])


def print_foot(rivals: Sequence[Store]) -> None:
    """What the columns and the stores mean."""
    print(
        "- write: from rows of one sample at a time until all is durable. CPU: seconds for each GB of activations; "
        "disk: bytes for each byte of activations; memory: growth of the process's at its peak, mapped files included. "
        "Ours also writes `embed`, a checksum of each row and the samples' table.\n"
        "- read: milliseconds and CPU milliseconds of one. cold: bytes from the disk for each that was asked for."
    )
    for store in (SHARED, SHARDS, DIRECT, CONTIGUOUS, *rivals):
        print(f"- {store.name}: {store.means}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes: fewer samples and rounds, not judged by goals")
    parser.add_argument("--rivals", help=f"some of {', '.join(RIVALS)}; default all; the limits are always there")
    parser.add_argument("--hidden", default=",".join(map(str, SIZES)), help="some of %(default)s, which is the default")
    parser.add_argument(
        "--samples", type=int, help="of each size, a multiple of 64 and at least 128, for trying it out"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    names = list(RIVALS) if arguments.rivals is None else [name for name in arguments.rivals.split(",") if name]
    sizes = arguments.hidden.split(",")
    for what, asked, known in (("rival", names, RIVALS), ("size", sizes, map(str, SIZES))):
        if unknown := sorted(set(asked) - set(known := list(known))):
            parser.error(f"no {what} {', '.join(unknown)}: expected some of {', '.join(known)}")
    if arguments.samples is not None and (arguments.samples < 128 or arguments.samples % 64):
        parser.error(f"{arguments.samples} samples: expected a multiple of 64, at least 128")
    rounds = QUICK if arguments.quick else replace(FULL, judged=arguments.samples is None)
    home = cache_folder() / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for hidden in map(int, sizes):
        size = SIZES[hidden]
        samples = arguments.samples or (size.quick_samples if arguments.quick else size.samples)
        # not in /tmp, which may be no disk
        with tempfile.TemporaryDirectory(dir=home) as folder, ExitStack() as stack:
            bench = StoreBench(Path(folder), size, samples, rounds, stack)
            needed, free = _FOLDS * bench.nbytes(OURS), shutil.disk_usage(folder).free
            if free < needed:
                sys.exit(
                    f"{home} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} are needed: use --quick, or free some"
                )
            rows += measure(bench, [RIVALS[name] for name in names])
    facts = machine("hiddenlake", "numpy", "tensorstore", "zarr", "safetensors", "torch") | disk(home)
    for name in names:
        if environment := RIVALS[name].environment:
            facts["versions"] |= pinned(environment)
    print(f"\n{facts}\n")
    print_table(rows)
    print_foot([RIVALS[name] for name in names])
    if arguments.json:
        write_json(arguments.json, rows, facts)


if __name__ == "__main__":
    main()
