"""The probe of "LLMs Know More Than They Show" on exported arrays, written from the paper's code without hiddenlake.

    python paper_scikit.py EXPORTED GRID.csv

EXPORTED is what `hiddenlake export --format npy` wrote. GRID.csv gets the AUC of the wrong answers in each cell, empty
where the paper's call has only one class. A token that the paper's code cannot index leaves the answer out of the cell,
and `exact_answer_after_last` is the last token where the exact answer ends the sequence.
"""

import csv
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, roc_curve
from sklearn.model_selection import train_test_split

SEED, SAMPLES, MOST_TOKENS = 0, 1000, 10_000


def drawn(valid: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows of training and validation, in the order of the draw. valid : (n,) bool, what is left of each."""
    np.random.seed(SEED)
    indices = np.arange(len(valid))
    np.random.shuffle(indices)
    parts = train_test_split(indices[:SAMPLES], test_size=0.2, random_state=SEED)
    return tuple([i for i in part if valid[i]] for part in parts)


def cell_auc(X: np.ndarray, correct: np.ndarray, train: list[int], validation: list[int]) -> float | None:
    if len(set(correct[train])) < 2 or len(set(correct[validation])) < 2:
        return None
    model = LogisticRegression(random_state=SEED).fit(X[train], correct[train])
    wrong = model.predict_proba(X[validation])[:, 0]
    false_positives, true_positives, _ = roc_curve(correct[validation], wrong, pos_label=0)
    return auc(false_positives, true_positives)


def main() -> None:
    exported, out = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore", ConvergenceWarning)
    positions = json.loads((exported / "manifest.json").read_text())["positions"]
    table = pq.read_table(exported / "keys.parquet")
    correct = np.array(table["correct"].to_pylist()).astype(int)
    valid = np.array(table["exact_answer_valid"].to_pylist(), bool)
    valid &= np.array(table["total_length"].to_pylist()) <= MOST_TOKENS
    train, validation = drawn(valid)
    [site] = [path for path in exported.iterdir() if path.is_dir() and list(path.glob("layer_*.npy"))]
    files = sorted(site.glob("layer_*.npy"), key=lambda path: int(path.stem.removeprefix("layer_")))
    with out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["layer", *positions])
        for path in files:
            layer = np.load(path, mmap_mode="r")
            found = []
            for p, position in enumerate(positions):
                X = np.array(layer[p])
                if position == "exact_answer_after_last":
                    absent = np.isnan(X).any(axis=1)
                    X[absent] = layer[positions.index("-1")][absent]
                there = ~np.isnan(X).any(axis=1)
                parts = [[i for i in part if there[i]] for part in (train, validation)]
                value = cell_auc(X, correct, *parts)
                found.append("" if value is None else repr(float(value)))
            rows.writerow([path.stem.removeprefix("layer_"), *found])


if __name__ == "__main__":
    main()
