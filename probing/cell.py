"""One cell: every probe of one (layer, position), as columns of one solve.

Shape letters: n samples, d features, C values of C, F folds, L label sets (the labels, then the shuffles).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.classification import classify
from hiddenlake.probing.metrics import auroc, bootstrap_interval, delong_interval
from hiddenlake.probing.solvers.certificate import certified_auc
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.problem import Problem, Solution, make_problem
from hiddenlake.probing.solvers.scikit import solve_scikit

SOLVERS: dict[str, Callable[[Problem, float], Solution]] = {
    "auto": solve_newton,
    "newton": solve_newton,
    "sklearn": solve_scikit,
}

# DeLong's variance needs two samples of each class in every fold.
MIN_PER_FOLD = 2


@dataclass(frozen=True, slots=True)
class Design:
    """What is the same in every cell of a grid.

    labels : (L, sample) bool, the real labels first.  fold : (sample,) int, the fold that holds a sample out.
    C : (C,).  group : (sample,) int where groups repeat, which asks for the grouped bootstrap, or None.
    """

    labels: np.ndarray
    fold: np.ndarray
    n_folds: int
    C: np.ndarray
    group: np.ndarray | None
    scale: str
    solver: str
    tol: float
    seed: int

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ProbeError(f"unknown solver {self.solver!r}: expected one of {', '.join(SOLVERS)}")
        if not len(self.C) or not (np.isfinite(self.C).all() and (self.C > 0).all()):
            raise ProbeError(f"C is {self.C.tolist()}: expected one or more numbers above 0")
        if not self.tol > 0:
            raise ProbeError(f"tol is {self.tol}: expected a number above 0, e.g. 1e-6")


@dataclass(frozen=True, slots=True)
class Cell:
    """The probes of one cell. `fold_*` : (C, F, L); NaN where a shuffle left a fold one class only.

    auc, auc_lo, auc_hi, shuffled_auc : (C,). auc_certified_lo, auc_certified_hi : (C,), between which the optimum's auc
    lies. metrics : name -> (C,), see `classification`. `reason` says why a cell has no probes, and is empty otherwise.
    """

    n_positive: int
    n_negative: int
    reason: str = ""
    fold_auc: np.ndarray | None = None
    fold_objective: np.ndarray | None = None
    fold_gap_bound: np.ndarray | None = None
    fold_n_iter: np.ndarray | None = None
    fold_converged: np.ndarray | None = None
    auc: np.ndarray | None = None
    auc_lo: np.ndarray | None = None
    auc_hi: np.ndarray | None = None
    shuffled_auc: np.ndarray | None = None
    auc_certified_lo: np.ndarray | None = None
    auc_certified_hi: np.ndarray | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)


def fit_cell(X: np.ndarray, rows: np.ndarray, design: Design) -> Cell:
    """Fit every column on the samples `rows` of one cell.

    X : (n, d) float32, the activations of those samples.  rows : (n,) int, which samples they are.
    """
    labels, fold = design.labels[:, rows], design.fold[rows]
    n_positive = int(labels[0].sum())
    cell = {"n_positive": n_positive, "n_negative": len(rows) - n_positive}
    if reason := too_few(labels[0], fold, design.n_folds):
        return Cell(**cell, reason=reason)
    train = fold[None, :] != np.arange(design.n_folds)[:, None]
    shape = (len(design.C), design.n_folds, len(labels))
    which_c, which_fold, which_labels = (axis.ravel() for axis in np.indices(shape))
    # A shuffle may leave a fold of a small cell with one class: that column has no probe.
    both = np.array([[two_classes(y, t) and two_classes(y, ~t) for y in labels] for t in train])
    fitted = both[which_fold, which_labels]
    problem = make_problem(
        X,
        labels,
        train,
        C=design.C[which_c[fitted]],
        fold=which_fold[fitted],
        label_set=which_labels[fitted],
        scale=design.scale,
    )
    solution = SOLVERS[design.solver](problem, design.tol)
    which_c, which_fold, which_labels = (which[fitted] for which in (which_c, which_fold, which_labels))
    same = _first_equal_row(X)
    auc, variance = np.full((2, len(which_c)), np.nan)
    # Of the real labels: each sample's score, without intercept, and probability by the probe that did not see it.
    held_scores, probability = np.empty((2, len(rows), len(design.C)))
    certified = np.zeros((2, design.n_folds, len(design.C)))
    for f in range(design.n_folds):
        out, columns = np.flatnonzero(~train[f]), np.flatnonzero(which_fold == f)
        held = problem.coordinates(f, out)
        # Equal rows must tie, and a matrix product may round them differently: each takes the score of its first.
        _, first, again = np.unique(same[out], return_index=True, return_inverse=True)
        scores = (held @ solution.coef[:, columns])[first[again]]
        measured = auroc(scores, labels[which_labels[columns]][:, out].T)
        auc[columns], variance[columns] = measured.auc, measured.variance
        real = which_labels[columns] == 0
        columns, scores = columns[real], scores[:, real]
        held_scores[np.ix_(out, which_c[columns])] = scores
        probability[np.ix_(out, which_c[columns])] = expit(scores + solution.intercept[columns])
        certified[:, f, which_c[columns]] = certified_auc(
            scores, labels[0, out], held, same[out], np.sqrt(2.0 * solution.gap_bound[columns])
        )

    def spread(values: np.ndarray, absent: float | bool = np.nan) -> np.ndarray:
        out = np.full(shape, absent, values.dtype)
        out.ravel()[fitted] = values
        return out

    fold_auc = spread(auc)
    auc_lo, auc_hi = delong_interval(fold_auc[..., 0], spread(variance)[..., 0])
    if design.group is not None:
        for c, one in enumerate(held_scores.T):
            auc_lo[c], auc_hi[c] = bootstrap_interval(one, labels[0], fold, design.group[rows], seed=design.seed)
    return Cell(
        **cell,
        fold_auc=fold_auc,
        fold_objective=spread(solution.objective),
        fold_gap_bound=spread(solution.gap_bound),
        fold_n_iter=spread(solution.n_iter, -1),
        fold_converged=spread(solution.converged, False),
        auc=fold_auc[..., 0].mean(axis=1),
        auc_lo=auc_lo,
        auc_hi=auc_hi,
        shuffled_auc=_mean_where_any(fold_auc[..., 1:]),
        auc_certified_lo=certified[0].mean(axis=0),
        auc_certified_hi=certified[1].mean(axis=0),
        metrics=classify(probability, labels[0]),
    )


def too_few(positive: np.ndarray, fold: np.ndarray, n_folds: int) -> str:
    """Why these samples cannot be cross-validated, in one sentence; empty when they can."""
    n, n_positive = len(positive), int(positive.sum())
    if n == 0:
        return "no sample has this token"
    if n_positive in (0, n):
        return f"one class only: {n_positive} positive, {n - n_positive} negative"
    for f in range(n_folds):
        inside = positive[fold == f]
        smaller = min(int(inside.sum()), int((~inside).sum()))
        if smaller < MIN_PER_FOLD:
            return (
                f"too few samples: fold {f} of {n_folds} holds {smaller} of the smaller class, at least "
                f"{MIN_PER_FOLD} are needed ({n_positive} positive, {n - n_positive} negative in all)"
            )
    return ""


def two_classes(positive: np.ndarray, inside: np.ndarray) -> bool:
    return bool(positive[inside].any() and not positive[inside].all())


def _first_equal_row(X: np.ndarray) -> np.ndarray:
    """(n,) for each row, the first row that equals it bit for bit."""
    bits = np.ascontiguousarray(X + 0.0)  # -0.0 becomes 0.0
    bits = bits.view(np.dtype((np.void, bits.dtype.itemsize * bits.shape[1]))).ravel()
    _, first, inverse = np.unique(bits, return_index=True, return_inverse=True)
    return first[inverse]


def _mean_where_any(fold_auc: np.ndarray) -> np.ndarray:
    """(C,) mean over folds and shuffles of what was fitted; NaN where nothing was."""
    there = np.isfinite(fold_auc)
    count = there.sum(axis=(1, 2))
    return np.where(count > 0, np.where(there, fold_auc, 0.0).sum(axis=(1, 2)) / np.maximum(count, 1), np.nan)
