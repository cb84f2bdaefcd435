"""Are the statistics calibrated? Grids of noise, fitted as users do: do 95 % intervals cover one half, are p-values uniform?

    python benchmarks/calibration.py [--quick] [--json FILE]

Each run draws labels that carry nothing for 8 cells, synthetic ones that have half of their activations in common or real
ones (captured at the first call, in minutes), and fits them by fit_probes with 5 folds and 19 shuffles. Then labels that
carry something, for cells of a known AUC: there the truth is what the fitted probes reach on the population that the
samples were drawn from, which is known.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr
from _probe_cells import capture_answers
from _table import Row, machine, print_table, write_json
from scipy import stats

from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.inference import max_t
from hiddenlake.probing.metrics import delong_interval
from hiddenlake.probing.splits import make_folds

CELLS = 8
SHUFFLES = 19
FOLDS = 5
Z95 = 1.959963984540054
MEANS = "the share of intervals that hold the truth, beside the same for intervals that take folds as independent"


@dataclass(frozen=True, slots=True)
class Case:
    """n samples, some of them of one group, of d features; `shift`: distance of the classes in standard deviations.

    real : (cell, more samples, d) activations that each run draws its n samples from.
    """

    n: int
    d: int
    shift: float = 0.0
    per_group: int = 1
    real: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        if self.real is not None:
            return f"real activations, n {self.n}, d {self.d}, no signal"
        groups = f", groups of {self.per_group}" if self.per_group > 1 else ""
        return f"n {self.n}, d {self.d}{groups}, " + (f"classes {self.shift:g} apart" if self.shift else "no signal")


@dataclass(frozen=True, slots=True)
class Calibration:
    """covered, naive : (run, cell) bool, whether the interval, and one that takes folds as independent, holds the truth.

    p : (run,) max-T p-values, with a fraction of the last shuffle added so that they are continuous.  auc : of all cells.
    """

    covered: np.ndarray
    naive: np.ndarray
    p: np.ndarray
    auc: float

    @property
    def coverage(self) -> tuple[float, float]:
        """(share, its standard error): cells of one run have their labels in common, so runs are what is counted."""
        return clustered(self.covered)


def clustered(hits: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) of (run, cell) hits, the runs being independent."""
    each = hits.mean(axis=1)
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def draw(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, n, d) activations, (n,) labels, (n,) groups. Samples of a group are alike, in activations and labels."""
    rng = np.random.default_rng([seed, 0xCA11])
    group = np.arange(case.n) // case.per_group
    y = (rng.random(case.n) < 0.4)[group] ^ ((rng.random(case.n) < 0.1) & (case.per_group > 1))
    if case.real is not None:
        return case.real[:, rng.permutation(case.real.shape[1])[: case.n]], y, group
    common = rng.standard_normal((case.n, case.d))
    own = rng.standard_normal((CELLS, case.n, case.d))
    if case.per_group > 1:
        common, own = common[group * case.per_group], np.sqrt(0.5) * (own + own[:, group * case.per_group])
    X = np.sqrt(0.5) * (common + own)
    X[..., 0] += case.shift * y
    return X.astype(np.float32), y, group


def real_case(n: int) -> Case:
    """8 cells of the demo's model: four layers by two tokens that every sample has."""
    capture = capture_answers()
    cells = [capture.read("mlp_out", layer, token) for layer in (0, 8, 16, 24) for token in ("last_q", "-1")]
    return Case(n, cells[0].shape[1], real=np.stack(cells).astype(np.float32))


def run(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(covered, naive, p, mean AUC) of one grid."""
    X, y, group = draw(case, seed)
    A = xr.DataArray(X, dims=("layer", "sample", "hidden"))
    shuffles = 0 if case.shift else SHUFFLES
    grid = fit_probes(A, y, cv=FOLDS, groups=group, shuffles=shuffles, seed=seed).squeeze(("position", "C"))
    if not bool(grid.converged.all()):
        raise RuntimeError(f"{case}: a probe has not converged")
    truth = reached(X, y, make_folds(y, n_folds=FOLDS, groups=group, seed=seed), case) if case.shift else 0.5
    auc, variance = grid.fold_auc.sel(label_set="label").values, grid.fold_variance.values
    naive = delong_interval(auc, variance, trained=False)
    p = np.nan
    if shuffles:
        p = max_t(grid.expand_dims(position=[""], C=[0.01])) - np.random.default_rng(seed).random() / (SHUFFLES + 1)
    return (
        (grid.auc_lo.values <= truth) & (truth <= grid.auc_hi.values), (naive[0] <= truth) & (truth <= naive[1]), p,
        float(grid.auc.mean()),
    )  # fmt: skip


def reached(X: np.ndarray, y: np.ndarray, fold: np.ndarray, case: Case) -> np.ndarray:
    """(cell,) what the probes of all folds reach on the population: Phi(w . shift / sqrt(2 w . w)), for unit covariance."""
    from hiddenlake.probing.solvers.newton import solve_newton
    from hiddenlake.probing.solvers.problem import make_problem

    found = []
    for cell in X:
        problem = make_problem(
            cell, y[None], fold[None] != np.arange(FOLDS)[:, None], C=np.full(FOLDS, 0.01), fold=np.arange(FOLDS),
            label_set=np.zeros(FOLDS, int),
        )  # fmt: skip
        w = solve_newton(problem).coef * problem.unit.numpy().T
        found.append(stats.norm.cdf(case.shift * w[0] / np.sqrt(2 * (w**2).sum(axis=0))).mean())
    return np.array(found)


def calibrate(case: Case, runs: int) -> Calibration:
    """Many grids of one case, each with labels and activations of its own."""
    covered, naive, p, auc = zip(*(run(case, seed) for seed in range(runs)), strict=True)
    return Calibration(np.stack(covered), np.stack(naive), np.array(p), float(np.mean(auc)))


def rows_of(case: Case, found: Calibration) -> list[Row]:
    """Coverage is judged within its error: 93 to 97 % without signal, at least 93 % with it."""
    share, error = found.coverage
    naive, _ = clustered(found.naive)
    low, high = share - Z95 * error, share + Z95 * error
    met = high >= 0.93 and (low <= 0.97 or case.shift > 0)
    rows = [
        Row(
            f"{case}: coverage of the 95 % interval", "share", share, naive, "folds taken as independent", share / naive,
            low / naive, high / naive, goal=0.95, met=bool(met), rounds=len(found.covered),
            note=f"{low:.3f} to {high:.3f} by runs; mean AUC {found.auc:.3f}", means=MEANS,
        )
    ]  # fmt: skip
    if np.isfinite(found.p).all():
        ks = float(stats.kstest(found.p, "uniform").pvalue)
        rows.append(
            Row(
                f"{case}: max-T p-value", "p of Kolmogorov-Smirnov", ks, None, "", goal=0.01, met=ks > 0.01,
                rounds=len(found.p), note=f"{(found.p <= 0.05).mean():.3f} of p-values are 0.05 or less",
            )
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 runs of the smallest case of each kind")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    cases = [Case(100, 8), Case(120, 8, per_group=3), Case(100, 8, 1.3)]
    if not arguments.quick:
        cases += [
            Case(200, 16),
            Case(300, 400),
            Case(1000, 16),
            Case(200, 16, 0.75),
            Case(200, 16, 1.8),
            Case(300, 400, 1.8),
            real_case(300),
        ]
    rows = []
    for case in cases:
        rows += rows_of(case, calibrate(case, 40 if arguments.quick else 300))
        print(f"{case}: {rows[-1].note}", file=sys.stderr)
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, machine("hiddenlake", "numpy", "scipy", "torch"))


if __name__ == "__main__":
    main()
