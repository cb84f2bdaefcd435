"""Cells for the probe benchmark: real activations of the demo's model, and synthetic ones as wide as a large model's."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from hiddenlake.cache.capture import run_job
from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.model import cache_folder
from hiddenlake.cache.progress import ProgressBar
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.probing.tasks.registry import load_task

# Of 2,000 answers: what a probe of 5 folds is trained on is 1,600.
SAMPLES = 2000

# Layers and tokens that differ in how ill-conditioned they are.
_REAL = (("resid_post", 20, "-1"), ("mlp_out", 13, "exact_answer_before_first"), ("resid_post", 10, "last_q"))


@dataclass(frozen=True)
class Cell:
    """X : (n, d) bfloat16.  wrong : (n,) bool."""

    name: str
    X: np.ndarray
    wrong: np.ndarray


def capture_answers(samples: int = SAMPLES) -> Capture:
    """The demo's capture, of more cities; made at the first call (minutes), and kept under the user's cache folder."""
    folder = cache_folder() / "benchmarks" / f"cities-{samples}"
    job = plan_job(demo_model(), load_task("cities", samples), sites=("mlp_out", "resid_post"), max_new_tokens=32)
    with ProgressBar() as bar:
        run_job(job, out=folder, watcher=bar)
    return open_capture(folder)


def real_cells(capture: Capture) -> list[Cell]:
    """576 hidden, rows whose token is there."""
    wrong = ~capture.samples()["correct"].to_numpy(zero_copy_only=False)
    cells = []
    for site, layer, position in _REAL:
        X = capture.read(site, layer, position)
        there = np.isfinite(X.astype(np.float32)).all(1)
        cells.append(Cell(f"{site}, layer {layer}, {position}", X[there], wrong[there]))
    return cells


def synthetic_cell(hidden: int, seed: int, samples: int = SAMPLES) -> Cell:
    """Features of very different sizes, means as large as their spread, a few directions far longer than the others:
    what large models' activations are like. A direction of its own decides the label, with noise.
    """
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((samples, hidden), np.float32) * np.exp(0.5 * rng.standard_normal(hidden, np.float32))
    X += 10 * rng.standard_normal((samples, 20), np.float32) @ rng.standard_normal((20, hidden), np.float32)
    X += 5 * rng.standard_normal(hidden, np.float32)
    told = X @ rng.standard_normal(hidden, np.float32)
    wrong = told + told.std() * rng.standard_normal(samples) > told.mean()
    return Cell("synthetic", X.astype(ml_dtypes.bfloat16), wrong)


def home() -> Path:
    """Where arms leave what they print."""
    folder = cache_folder() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
