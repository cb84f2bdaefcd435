"""Probes on CUDA: how many certified fits a second, beside cuML's own loop and what their matrix products alone would take.

    python benchmarks/gpu/probes.py [--quick] [--json FILE] [--no-cuml]

1,000 fits a cell are 5 folds x 10 values of C (1e-5 to 1) x the labels and 19 shuffles, trained on four fifths of the
samples, standardised there, certified to 1e-6 of their objective. Rows are bfloat16 and lie on the device before the clock
starts; what each fit needs of the host is in its time. cuML fits one column after the other, in several threads with a stream
each, at the loosest tolerance with which the same certificate holds; some of the 1,000 are timed. The roofline is the time
that this device takes for as many float32 operations in large matrix products as the solver's products have.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from _kernels import about, seconds
from _probe_cells import synthetic_cell
from _table import Row, compare, print_table, write_json

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.probing.controls import shuffle_labels
from hiddenlake.probing.design import SOLVERS
from hiddenlake.probing.solvers.problem import Problem, as_tensor, make_problem

TOL = 1e-6
FOLDS, LABEL_SETS = 5, 20
STRENGTHS = np.logspace(-5, 0, 10)

# Of the 1,000 fits, those that are timed of cuML: both kinds of labels at every C, in one fold.
_CUML_LABELS = 2

_GEMM = 8192


@dataclass(frozen=True)
class Case:
    """goal : fits a second.  cuml_goal : how many times as many as cuML's loop."""

    samples: int
    hidden: int
    strengths: int = len(STRENGTHS)
    folds: int = FOLDS
    label_sets: int = LABEL_SETS
    goal: float | None = None
    cuml_goal: float | None = None

    @property
    def fits(self) -> int:
        return self.strengths * self.folds * self.label_sets

    @property
    def name(self) -> str:
        return f"{self.samples:,} x {self.hidden}, {self.fits:,} fits a cell"


CASES = (
    Case(2000, 4096, goal=1e5, cuml_goal=20.0),
    Case(2000, 576),
    Case(10_000, 4096),
    Case(2000, 4096, strengths=1, folds=1, label_sets=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes: fewer rounds, without the largest case")
    parser.add_argument("--no-cuml", action="store_true", help="leave cuML out, where it is not installed")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu/probes.py needs a CUDA device, and torch sees none.")
    facts = about()
    print(f"{facts}\n")
    cases = [case for case in CASES if not arguments.quick or case.samples < 10_000]
    rows = [row for case in cases for row in measured(case, 3 if arguments.quick else 10, not arguments.no_cuml)]
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)


class Cell:
    """One synthetic cell on the device, with its folds and label sets."""

    def __init__(self, case: Case) -> None:
        cell = synthetic_cell(case.hidden, 0, case.samples)
        n = len(cell.wrong)
        self.X = as_tensor(cell.X).cuda()
        fold = np.random.default_rng(0).permutation(n) % FOLDS
        self.train = fold != np.arange(FOLDS)[:, None]
        self.labels = np.concatenate(
            [cell.wrong[None], shuffle_labels(cell.wrong, np.arange(n), n=LABEL_SETS - 1, seed=0)]
        )

    def problem(self, strengths: int, folds: int, label_sets: int) -> Problem:
        c, fold, label_set = (axis.ravel() for axis in np.indices((strengths, folds, label_sets)))
        # one of them alone is of the usual strength
        values = STRENGTHS if strengths > 1 else np.array([0.01])
        return make_problem(
            self.X, self.labels[:label_sets], self.train[:folds], C=values[c], fold=fold, label_set=label_set
        )


def fits_a_second(cell: Cell, solver: str, strengths: int, folds: int, label_sets: int) -> float:
    """Certificates and what the host does included. Raises RuntimeError where a certificate does not hold."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = SOLVERS[solver](cell.problem(strengths, folds, label_sets), TOL)
    torch.cuda.synchronize()
    passed = time.perf_counter() - start
    if not found.converged.all():
        raise RuntimeError(f"{solver}: {(~found.converged).sum()} of {len(found.converged)} fits did not converge")
    return len(found.converged) / passed


def measured(case: Case, rounds: int, cuml: bool) -> list[Row]:
    cell = Cell(case)
    shape = case.strengths, case.folds, case.label_sets
    ours, theirs, why = [], [], "left out"
    fits_a_second(cell, "newton", *shape)
    for r in range(rounds):
        ours.append(fits_a_second(cell, "newton", *shape))
        if cuml:
            try:
                theirs.append(fits_a_second(cell, "cuml", case.strengths, 1, min(_CUML_LABELS, case.label_sets)))
            except HiddenlakeError as error:
                cuml, why = False, str(error)
        print(f"{case.name}, round {r + 1}: {ours[-1]:,.0f} fits/s", file=sys.stderr)
    rate = float(np.median(ours))
    peak = torch.cuda.max_memory_allocated() / 2**30
    note = f"{peak:.1f} GiB on the device at most"
    rows = [
        Row(case.name, "fits/s", rate, None, "the goal", goal=case.goal, met=case.goal and rate >= case.goal,
            rounds=rounds, note=note)
    ]  # fmt: skip
    if theirs:
        rows.append(
            compare(case.name, "fits/s", ours, theirs, "cuML's QN, a loop", goal=case.cuml_goal, less_is_better=False)
        )
    else:
        rows.append(Row(case.name, "fits/s", rate, None, "cuML's QN, a loop", goal=case.cuml_goal, note=why))
    limit = [case.fits / products_alone(cell, shape)] * rounds
    rows.append(
        compare(case.name, "fits/s", ours, limit, "its matrix products alone (the limit)", less_is_better=False)
    )
    return rows


def products_alone(cell: Cell, shape: tuple[int, int, int]) -> float:
    """Seconds of the matrix products of one solve, at the rate of a large one in float32."""
    with FlopCounterMode(display=False) as counted:
        SOLVERS["newton"](cell.problem(*shape), TOL)
    one, other = (torch.randn(_GEMM, _GEMM, device="cuda") for _ in range(2))
    return counted.get_total_flops() / (2 * _GEMM**3 / seconds(lambda: one @ other, 3))


if __name__ == "__main__":
    main()
