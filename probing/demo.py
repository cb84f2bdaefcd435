"""The demo: the main job on a real model, from prompts to pictures, and the numbers that a reader asks for."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hiddenlake.cache.capture import run_job
from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.engines.plain_vllm import PlainVllm
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.progress import ProgressBar, counted, size
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.probing.grid import best_cell, fit_grid
from hiddenlake.probing.plots import draw_heatmap
from hiddenlake.probing.report.page import check_ready, write_report
from hiddenlake.probing.run import run_grid
from hiddenlake.probing.tasks.registry import load_task

SITES = ("mlp_out", "resid_post")
MAX_NEW_TOKENS = 32

# Answers generated without capture before and after the captured run, so that a machine whose speed drifts
# is compared with itself.
PLAIN_SAMPLES = 200


def run_demo(out: Path, samples: int = 1000) -> dict[str, Any]:
    """Capture `cities`, fit a grid a site, draw them, print a table, and write `summary.json`.

    out : folder for `lake/cities`, `grids/<site>.zarr`, `<site>.png`, `report.html` and `summary.json`. A finished demo is
        made anew, since its rates are measured; an interrupted one goes on.
    """
    report = check_ready(out / "report.html")
    lake = out / "lake" / "cities"
    if (out / "summary.json").exists():
        _say(f"{out} holds a finished demo: it is made anew")
        (out / "summary.json").unlink()
        shutil.rmtree(lake, ignore_errors=True)
    summary = _capture(lake, samples)
    capture = open_capture(lake)
    correct = capture.samples()["correct"].to_numpy(zero_copy_only=False)
    summary |= {"accuracy": float(correct.mean()), "samples": len(capture), "sites": {}}
    for site in SITES:
        summary["sites"][site] = _probe(capture, site, out)
    _say("writing the report")
    write_report(capture, [out / "grids" / f"{site}.zarr" for site in SITES], report)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _print(summary, out)
    return summary


def _capture(lake: Path, samples: int) -> dict[str, Any]:
    task = load_task("cities", samples)
    job = plan_job(demo_model(), task, sites=SITES, max_new_tokens=MAX_NEW_TOKENS, dtype="bfloat16")
    prompts = job.prompts[:PLAIN_SAMPLES]
    _say(f"starting vLLM without capture: {len(prompts)} answers before and {len(prompts)} after, to compare with")
    plain = PlainVllm(job.request)
    seconds = []
    try:
        plain.generate(prompts[:8])  # first use costs
        seconds.append(_time(lambda: plain.generate(prompts)))
        _say(f"capturing {samples} answers")
        with ProgressBar() as bar:
            done = run_job(job, out=lake, watcher=bar)
        seconds.append(_time(lambda: plain.generate(prompts)))
    finally:
        plain.close()
    if done.interrupted:
        raise KeyboardInterrupt
    return {
        "samples_per_s": done.committed / done.seconds,
        "samples_per_s_without_capture": 2 * len(prompts) / sum(seconds),
        "bytes": open_capture(lake).nbytes,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _time(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _probe(capture: Capture, site: str, out: Path) -> dict[str, Any]:
    _say(f"fitting probes of {site}")
    with counted(f"probing {site}") as progress:
        grid = run_grid(capture, site, out / "grids" / f"{site}.zarr", groups="group", progress=progress)
    draw_heatmap(grid, out / f"{site}.png")
    best = best_cell(grid)
    by_country = fit_grid(capture, site, groups="gold", layers=[best.layer], positions=[best.position])
    return {
        "layer": best.layer,
        "position": best.position,
        "auc": best.auc,
        "auc_lo": best.auc_lo,
        "auc_hi": best.auc_hi,
        "token_identity_auc": float(grid.token_auc.sel(position=best.position, C=best.C)),
        "auc_grouped_by_country": best_cell(by_country).auc,
        "shuffled_auc": float(np.nanmean(grid.shuffled_auc)),
        "max_gap_bound": float(grid.gap_bound.max()),
    }


def _print(summary: dict[str, Any], out: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    rate, plain = summary["samples_per_s"], summary["samples_per_s_without_capture"]
    table.add_row("answers", f"{summary['samples']}, accuracy {summary['accuracy']:.3f}")
    table.add_row("samples/s with capture", f"{rate:.2f} (durable on disk)")
    table.add_row("samples/s without", f"{plain:.2f} (ratio {rate / plain:.2f})")
    table.add_row("bytes", f"{summary['bytes']} ({size(summary['bytes'])})")
    for site, found in summary["sites"].items():
        table.add_row(
            f"{site}: best cell",
            f"layer {found['layer']}, {found['position']}: AUC {found['auc']:.3f} "
            f"[{found['auc_lo']:.3f}, {found['auc_hi']:.3f}]",
        )
        table.add_row("  token identity alone", f"{found['token_identity_auc']:.3f}")
        table.add_row("  grouped by country", f"{found['auc_grouped_by_country']:.3f}")
        table.add_row("  shuffled labels, all cells", f"{found['shuffled_auc']:.3f}")
        table.add_row("  largest gap bound", f"{found['max_gap_bound']:.2e}")
        table.add_row("  picture", str(out / f"{site}.png"))
    table.add_row("report", str(out / "report.html"))
    # `make demo` made `demo`, and has a word for it.
    again = "make demo-serve, which is " if out == Path("demo") else ""
    table.add_row("page", f"{again}hiddenlake serve {out / 'lake'}")
    # a file or a pipe has no width: nothing is to be cut there
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
