"""Solve: every probe of one cell, as columns of one batch.

Shape letters: n samples, d features, C values of C, F folds, L label sets (the labels, then what is fitted beside them),
K columns, I inner columns (the labels, with two folds left out).
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hiddenlake.probing.design import Design, solver_of
from hiddenlake.probing.solvers.batches import solve_in_batches
from hiddenlake.probing.solvers.place import check_device, queue_of_thread
from hiddenlake.probing.solvers.problem import Problem, Solution, as_tensor, make_problem
from hiddenlake.probing.weights import column_class_weights

# DeLong's variance needs two samples of each class in every fold.
MIN_PER_FOLD = 2


@dataclass(frozen=True, slots=True)
class Solved:
    """The probes of one cell.

    labels : (L, n) bool.  fold : (n,) int, the fold that holds a sample out.
    out : (F or more, F) bool, the folds that each training mask leaves out: first each fold, then each pair of them.
    shape : (C, F, L), of the columns that leave one fold out.  fitted : (C * F * L,) bool, which of them there are.
    C, mask, label_set : (K + I,) int of each column that there is: which C, which mask, which labels. Inner columns
    come last.
    """

    labels: np.ndarray
    fold: np.ndarray
    out: np.ndarray
    shape: tuple[int, int, int]
    fitted: np.ndarray
    C: np.ndarray
    mask: np.ndarray
    label_set: np.ndarray
    problem: Problem
    solution: Solution

    def spread(self, values: np.ndarray, absent: float | bool = np.nan) -> np.ndarray:
        """(C, F, L) of (K + I,) values, `absent` where no probe was fitted."""
        out = np.full(self.shape, absent, values.dtype)
        out.ravel()[self.fitted] = values[: int(self.fitted.sum())]
        return out

    @property
    def inner(self) -> slice:
        """Of the inner columns."""
        return slice(int(self.fitted.sum()), None)


def solve_cell(X: np.ndarray, rows: np.ndarray, design: Design, position: int = 0) -> Solved:
    """Fit every column on the samples `rows` of one cell, of which `too_few` says nothing.

    X : (n, d), any float, the activations of those samples.  rows : (n,) int, which samples they are.
    position : its number.
    """
    labels, fold = design.label_sets(position)[:, rows], design.fold[rows]
    out = left_out(design.n_folds, design.nested)
    held = out[:, fold]
    weight = ~held * design.sample_weight[rows]
    shape = (len(design.C), design.n_folds, len(labels))
    main = np.stack([axis.ravel() for axis in np.indices(shape)])
    inner = np.stack([axis.ravel() for axis in np.indices((len(design.C), len(out) - design.n_folds, 1))])
    inner[1] += design.n_folds
    # A shuffle may leave a fold of a small cell with one class: that column has no probe.
    both = np.array(
        [[two_classes(y, w > 0) and two_classes(y, h) for y in labels] for h, w in zip(held, weight, strict=True)]
    )
    fitted = both[main[1], main[2]]
    which_c, mask, label_set = np.concatenate([main[:, fitted], inner[:, both[inner[1], 0]]], axis=1)
    device = check_device(design.device)
    with queue_of_thread(device):
        problem = make_problem(
            as_tensor(X).to(device), labels, weight, C=design.C[which_c], fold=mask, label_set=label_set,
            scale=design.scale, l1_ratio=design.l1_ratio,
            class_weight=column_class_weights(design.class_weight, labels, weight, fold=mask, label_set=label_set),
        )  # fmt: skip
        solution = solve_in_batches(
            solver_of(design.solver, design.l1_ratio), problem, design.tol, label_set * len(design.C) + which_c,
            design.columns_at_once,
        )  # fmt: skip
    return Solved(labels, fold, out, shape, fitted, which_c, mask, label_set, problem, solution)


def left_out(n_folds: int, nested: bool) -> np.ndarray:
    """(F or F + F (F - 1) / 2, F) bool, the folds that each training mask leaves out.

    Without folds i and j, one probe serves the cross-validation inside all but i, where it is scored on j, and that inside
    all but j: half the fits of a nested cross-validation.
    """
    pairs = list(combinations(range(n_folds), 2)) if nested else []
    out = np.zeros((n_folds + len(pairs), n_folds), bool)
    for mask, folds in enumerate([*((f,) for f in range(n_folds)), *pairs]):
        out[mask, list(folds)] = True
    return out


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
