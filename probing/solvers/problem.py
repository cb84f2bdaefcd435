"""Problem: many logistic regressions on the same rows, as columns of one batch.

Shape letters: n rows (samples), d features, F folds, K columns (fold x C x label set).
A column minimises, in scikit-learn's convention,

    C * sum_i train_i * log(1 + exp(-y_i z_i)) + 0.5 * ||w||^2,   z = X (w * unit) + b,   b free.

The rows are held once. A fold is a zero weight on the rows outside it, and its scaling is folded
into the weights (z = X (w * unit)) instead of into a copy of X.
"""

from dataclasses import dataclass

import numpy as np

from hiddenlake.cache.errors import ProbeError

SCALES = ("none", "rms", "feature")


@dataclass(frozen=True, slots=True)
class Problem:
    """K logistic regressions on the same n rows. All arrays float64.

    rows : (n, d), centred over all rows: the intercept takes the mean up, so no optimum changes.
    sign : (n, K), +1 for the positive class, -1 for the other.
    weight : (n, K), C on the rows that a column is trained on, 0 on the others.
    unit : (F, d), what each feature is multiplied by in each fold; 0 where it is constant there.
    fold : (K,) int, the fold of each column.
    """

    rows: np.ndarray
    sign: np.ndarray
    weight: np.ndarray
    unit: np.ndarray
    fold: np.ndarray

    def scores(self, coef: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n, k) scores without intercept of (d, k) weights of these columns."""
        return self.rows @ (coef * self.unit[self.fold[columns]].T)

    def pull(self, residual: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(d, k) gradient with respect to the weights of (n, k) derivatives with respect to the scores."""
        return (self.rows.T @ residual) * self.unit[self.fold[columns]].T


@dataclass(frozen=True, slots=True)
class Solution:
    """K fitted probes in the coordinates of their Problem, each with its certificate.

    coef : (d, K) float64.  intercept : (K,).
    objective, gap_bound : (K,): the objective is at most gap_bound above the optimum.
    n_iter : (K,) int, Newton or L-BFGS steps.  converged : (K,) bool, gap_bound <= tol * objective.
    """

    coef: np.ndarray
    intercept: np.ndarray
    objective: np.ndarray
    gap_bound: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray


def make_problem(
    X: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    *,
    C: np.ndarray,
    fold: np.ndarray,
    label_set: np.ndarray,
    scale: str = "feature",
) -> Problem:
    """Columns over the rows of one cell.

    X : (n, d), any float; widened to float64 once.
    labels : (label sets, n) bool.  train : (F, n) bool, the training rows of each fold.
    C, fold, label_set : (K,) which C, fold and label set each column has.
    scale : `none`, `rms` (one number a fold) or `feature` (standard deviation of each feature), from
        the training rows of the fold.

    Raises ProbeError when X holds values that are not finite, or a column has one class only.
    """
    if scale not in SCALES:
        raise ProbeError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    X = np.asarray(X, np.float64)
    if not np.isfinite(X).all():
        bad = int((~np.isfinite(X).all(axis=1)).sum())
        raise ProbeError(f"{bad} of {len(X)} rows hold NaN or infinity: leave them out with `mask`")
    centre = X.mean(axis=0)
    rows = X - centre
    unit = _fold_scales(rows, centre, np.asarray(train, np.float64), scale)
    chosen = labels[label_set].T
    weight = train[fold].T * np.asarray(C, np.float64)
    positive = (weight * chosen).sum(axis=0)
    lacking = np.flatnonzero((positive <= 0) | (positive >= weight.sum(axis=0)))
    if len(lacking):
        raise ProbeError(
            f"fold {int(fold[lacking[0]])} has one class only among its training rows ({len(lacking)} of "
            f"{len(fold)} columns): use fewer folds or other groups"
        )
    return Problem(rows, np.where(chosen, 1.0, -1.0), weight, unit, np.asarray(fold))


def _fold_scales(rows: np.ndarray, centre: np.ndarray, train: np.ndarray, scale: str) -> np.ndarray:
    count = train.sum(axis=1, keepdims=True)
    mean = train @ rows / count
    # rows are centred over all folds, so that this difference of squares does not cancel
    variance = np.maximum(train @ rows**2 / count - mean**2, 0.0)
    # A column of one repeated value has a variance of rounding errors. The bound is scikit-learn's
    # (sklearn.preprocessing._data._is_constant_feature).
    eps = np.finfo(np.float64).eps
    constant = variance <= count * eps * variance + (count * (np.abs(mean + centre)) * eps) ** 2
    varying = np.where(constant, 0.0, variance)
    if scale == "none":
        unit = np.where(constant, 0.0, 1.0)
    elif scale == "rms":
        rms = np.sqrt(varying.mean(axis=1, keepdims=True))
        unit = np.where(constant, 0.0, 1.0 / np.where(rms > 0, rms, 1.0))
    else:
        unit = np.where(constant, 0.0, 1.0 / np.sqrt(np.where(constant, 1.0, variance)))
    return unit
