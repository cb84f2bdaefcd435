"""One cell: the probes of one (layer, position), fitted, judged and summed up.

Shape letters: n samples, d features, C values of C, F folds, L label sets (the labels, then the shuffles, then others).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit

from hiddenlake.probing.classification import classify
from hiddenlake.probing.design import Design
from hiddenlake.probing.judge import Judged, judge
from hiddenlake.probing.metrics import bootstrap_variance, delong_interval
from hiddenlake.probing.solve import Solved, solve_cell, too_few


@dataclass(frozen=True, slots=True)
class Cell:
    """The probes of one cell. `fold_*` : (C, F, L); NaN where a shuffle left a fold one class only.

    auc, auc_lo, auc_hi, shuffled_auc : (C,). fold_variance : (C, F), of the labels' fold_auc. inner_auc : (C, F), mean AUC of
    the other folds when neither they nor this one was trained on, inner_gap : (C,), the largest relative gap of those
    probes; None where no choice is nested. auc_certified_lo, auc_certified_hi : (C,), between which the optimum's auc
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
    fold_variance: np.ndarray | None = None
    inner_auc: np.ndarray | None = None
    inner_gap: np.ndarray | None = None
    auc_certified_lo: np.ndarray | None = None
    auc_certified_hi: np.ndarray | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)


def fit_cell(X: np.ndarray, rows: np.ndarray, design: Design, position: int = 0) -> Cell:
    """Fit and judge every column on the samples `rows` of one cell.

    X : (n, d), any float, the activations of those samples.  rows : (n,) int, which samples they are.
    position : its number.
    """
    positive, fold = design.labels[0, rows], design.fold[rows]
    counts = {"n_positive": int(positive.sum()), "n_negative": int((~positive).sum())}
    if reason := too_few(positive, fold, design.n_folds, design.sample_weight[rows]):
        return Cell(**counts, reason=reason)
    solved = solve_cell(X, rows, design, position)
    judged = judge(solved, X)
    solution, spread = solved.solution, solved.spread
    fold_auc, variance = spread(judged.auc), spread(judged.variance)[..., 0]
    if design.group is not None:
        for c, score in enumerate(judged.score.T):
            variance[c] = bootstrap_variance(score, positive, fold, design.group[rows], seed=design.seed)
    auc_lo, auc_hi = delong_interval(fold_auc[..., 0], variance)
    return Cell(
        **counts,
        fold_auc=fold_auc,
        fold_objective=spread(solution.objective),
        fold_gap_bound=spread(solution.gap_bound),
        fold_n_iter=spread(solution.n_iter, -1),
        fold_converged=spread(solution.converged, False),
        auc=fold_auc[..., 0].mean(axis=1),
        auc_lo=auc_lo,
        auc_hi=auc_hi,
        shuffled_auc=_mean_where_any(fold_auc[..., 1 : len(design.labels)]),
        fold_variance=variance,
        **(_inner(solved, judged) if design.nested else {}),
        auc_certified_lo=judged.certified_lo.mean(axis=0),
        auc_certified_hi=judged.certified_hi.mean(axis=0),
        metrics=classify(expit(judged.score), positive),
    )


def _inner(solved: Solved, judged: Judged) -> dict[str, np.ndarray]:
    solution, inner = solved.solution, solved.inner
    gap = np.zeros(solved.shape[0])
    np.maximum.at(gap, solved.C[inner], solution.gap_bound[inner] / solution.objective[inner])
    # the diagonal is no inner fold
    others = np.where(np.eye(solved.shape[1], dtype=bool), 0.0, judged.inner_auc)
    return {"inner_auc": others.sum(axis=2) / (solved.shape[1] - 1), "inner_gap": gap}


def _mean_where_any(fold_auc: np.ndarray) -> np.ndarray:
    """(C,) mean over folds and shuffles of what was fitted; NaN where nothing was."""
    there = np.isfinite(fold_auc)
    count = there.sum(axis=(1, 2))
    return np.where(count > 0, np.where(there, fold_auc, 0.0).sum(axis=(1, 2)) / np.maximum(count, 1), np.nan)
