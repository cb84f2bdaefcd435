"""Solve: every probe of one cell, as columns of one batch.

Shape letters: n samples, d features, C values of C, F folds, L label sets (the labels, then the shuffles), K columns.
"""

from dataclasses import dataclass

import numpy as np

from hiddenlake.probing.design import Design, solver_of
from hiddenlake.probing.solvers.problem import Problem, Solution, make_problem
from hiddenlake.probing.weights import column_class_weights

# DeLong's variance needs two samples of each class in every fold.
MIN_PER_FOLD = 2


@dataclass(frozen=True, slots=True)
class Solved:
    """The probes of one cell.

    labels : (L, n) bool.  fold : (n,) int, the fold that holds a sample out.
    shape : (C, F, L), of all columns.  fitted : (C * F * L,) bool, which of them there are.
    C, held, label_set : (K,) int of each column that there is: which C, which fold it did not see, which labels.
    """

    labels: np.ndarray
    fold: np.ndarray
    shape: tuple[int, int, int]
    fitted: np.ndarray
    C: np.ndarray
    held: np.ndarray
    label_set: np.ndarray
    problem: Problem
    solution: Solution

    def spread(self, values: np.ndarray, absent: float | bool = np.nan) -> np.ndarray:
        """(C, F, L) of (K,) values, `absent` where no probe was fitted."""
        out = np.full(self.shape, absent, values.dtype)
        out.ravel()[self.fitted] = values
        return out


def solve_cell(X: np.ndarray, rows: np.ndarray, design: Design) -> Solved:
    """Fit every column on the samples `rows` of one cell, of which `too_few` says nothing.

    X : (n, d), any float, the activations of those samples.  rows : (n,) int, which samples they are.
    """
    labels, fold = design.labels[:, rows], design.fold[rows]
    train = fold[None, :] != np.arange(design.n_folds)[:, None]
    shape = (len(design.C), design.n_folds, len(labels))
    which_c, which_fold, which_labels = (axis.ravel() for axis in np.indices(shape))
    # A shuffle may leave a fold of a small cell with one class: that column has no probe.
    weight = train * design.sample_weight[rows]
    both = np.array(
        [[two_classes(y, w > 0) and two_classes(y, ~t) for y in labels] for t, w in zip(train, weight, strict=True)]
    )
    fitted = both[which_fold, which_labels]
    which_c, which_fold, which_labels = (which[fitted] for which in (which_c, which_fold, which_labels))
    problem = make_problem(
        X, labels, weight, C=design.C[which_c], fold=which_fold, label_set=which_labels, scale=design.scale,
        l1_ratio=design.l1_ratio,
        class_weight=column_class_weights(
            design.class_weight, labels, weight, fold=which_fold, label_set=which_labels
        ),
    )  # fmt: skip
    solution = solver_of(design.solver, design.l1_ratio)(problem, design.tol)
    return Solved(labels, fold, shape, fitted, which_c, which_fold, which_labels, problem, solution)


def too_few(positive: np.ndarray, fold: np.ndarray, n_folds: int, weight: np.ndarray | None = None) -> str:
    """Why these samples cannot be cross-validated, in one sentence; empty when they can.

    positive, fold, weight : (n,).
    """
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
        if weight is not None and not two_classes(positive, (fold != f) & (weight > 0)):
            return f"one class only among the samples whose weight is above 0 outside fold {f} of {n_folds}"
    return ""


def two_classes(positive: np.ndarray, inside: np.ndarray) -> bool:
    return bool(positive[inside].any() and not positive[inside].all())
