"""One cell of more than two classes: its models, fitted and judged.

Shape letters: n samples, d features, C values of C, F folds, L label sets (the labels, then the shuffles), c classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.class_metrics import class_aucs
from hiddenlake.probing.equal_rows import first_equal_row
from hiddenlake.probing.metrics import delong_interval
from hiddenlake.probing.solve import MIN_PER_FOLD
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.problem import Problem, Solution, make_problem
from hiddenlake.probing.solvers.softmax import solve_softmax
from hiddenlake.probing.weights import column_class_weights


@dataclass(frozen=True, slots=True)
class ClassDesign:
    """What is the same in every cell.

    labels : (L, sample) int, the number of the class, the real labels first.  classes : their names.
    multiclass : `softmax` or `ovr`.  class_weight : None or `balanced`.  The others are those of a Design.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    multiclass: str
    fold: np.ndarray
    n_folds: int
    C: np.ndarray
    group: np.ndarray | None
    scale: str
    tol: float
    sample_weight: np.ndarray
    class_weight: str | None

    def __post_init__(self) -> None:
        if self.multiclass not in ("softmax", "ovr"):
            raise UnknownNameError(f"unknown multiclass {self.multiclass!r}: expected `softmax` or `ovr`")
        if self.class_weight not in (None, "balanced"):
            raise ProbeError(
                f"class_weight is {self.class_weight!r}: expected None or `balanced`; sample_weight can say the rest"
            )
        if not len(self.C) or not (np.isfinite(self.C).all() and (self.C > 0).all()):
            raise ProbeError(f"C is {self.C.tolist()}: expected one or more numbers above 0")
        if not self.tol > 0:
            raise ProbeError(f"tol is {self.tol}: expected a number above 0, e.g. 1e-6")


@dataclass(frozen=True, slots=True)
class ClassCell:
    """The models of one cell. n_class : (c,).  reason : why there are none, else empty.

    per_fold : name -> (C, F, L), NaN where a shuffle left a fold without a class.  values : name -> (C,), (C, c) or (C, c, c),
    all of the real labels.
    """

    n_class: np.ndarray
    reason: str = ""
    per_fold: dict[str, np.ndarray] | None = None
    values: dict[str, np.ndarray] | None = None


def fit_class_cell(X: np.ndarray, rows: np.ndarray, design: ClassDesign) -> ClassCell:
    """Fit and judge every model on the samples `rows` of one cell.

    X : (n, d), any float, the activations of those samples.  rows : (n,) int, which samples they are.
    """
    labels, fold, c = design.labels[:, rows], design.fold[rows], len(design.classes)
    counts = np.bincount(labels[0], minlength=c)
    held = fold[None, :] == np.arange(design.n_folds)[:, None]
    weight = ~held * design.sample_weight[rows]
    if reason := _too_few(labels[0], held, weight, design):
        return ClassCell(counts, reason)
    shape = (len(design.C), design.n_folds, len(labels))
    there = np.array(
        [
            [_has_all(y[out], c, MIN_PER_FOLD) and _has_all(y[w > 0], c, 1) for y in labels]
            for out, w in zip(held, weight, strict=True)
        ]
    )
    which_C, which_fold, which_set = (axis.ravel() for axis in np.indices(shape))
    fitted = there[which_fold, which_set]
    which_C, which_fold, which_set = (which[fitted] for which in (which_C, which_fold, which_set))
    one_hot = (labels[:, None] == np.arange(c)[:, None]).reshape(-1, len(rows))
    column = {"fold": np.repeat(which_fold, c), "label_set": (c * which_set[:, None] + np.arange(c)).ravel()}
    problem = make_problem(
        X, one_hot, weight, C=np.repeat(design.C[which_C], c), scale=design.scale,
        class_weight=_class_weight(design, one_hot, weight, column), **column,
    )  # fmt: skip
    solution = _solve(problem, design)
    auc, variance = np.full((2, len(which_C)), np.nan)
    class_auc, class_variance = np.full((2, len(design.C), design.n_folds, c), np.nan)
    log_share = np.empty((len(design.C), len(rows), c))
    same = first_equal_row(X)
    for f in range(design.n_folds):
        out, models = np.flatnonzero(held[f]), np.flatnonzero(which_fold == f)
        columns = (c * models[:, None] + np.arange(c)).ravel()
        # Equal rows must tie, and a matrix product may round them differently: each takes the score of its first.
        _, first, again = np.unique(same[out], return_index=True, return_inverse=True)
        scores = problem.coordinates(f, out) @ solution.coef[:, columns] + solution.intercept[columns]
        scores = scores[first[again]].reshape(len(out), len(models), c)
        for at, model in enumerate(models):
            ranked, logs = _judge(scores[:, at], design.multiclass)
            group = None if design.group is None else design.group[rows[out]]
            found = class_aucs(ranked, labels[which_set[model], out], group)
            auc[model], variance[model] = found.macro, found.macro_variance
            if which_set[model] == 0:
                class_auc[which_C[model], f], class_variance[which_C[model], f] = found.auc, found.variance
                log_share[which_C[model], out] = logs

    def spread(values: np.ndarray, absent: float | bool = np.nan) -> np.ndarray:
        full = np.full(shape, absent, values.dtype)
        full.ravel()[fitted] = values
        return full

    per_fold = {
        "fold_auc": spread(auc), "fold_objective": spread(solution.objective),
        "fold_gap_bound": spread(solution.gap_bound), "fold_n_iter": spread(solution.n_iter, -1),
        "fold_converged": spread(solution.converged, False),
    }  # fmt: skip
    low, high = delong_interval(per_fold["fold_auc"][..., 0], spread(variance)[..., 0])
    class_low, class_high = delong_interval(np.moveaxis(class_auc, 1, -1), np.moveaxis(class_variance, 1, -1))
    predicted = log_share.argmax(axis=2)
    confusion = np.zeros((len(design.C), c, c), int)
    for k, said in enumerate(predicted):
        np.add.at(confusion[k], (labels[0], said), 1)
    values = {
        "auc": per_fold["fold_auc"][..., 0].mean(axis=1), "auc_lo": low, "auc_hi": high,
        "class_auc": class_auc.mean(axis=1), "class_auc_lo": class_low, "class_auc_hi": class_high,
        "accuracy": (predicted == labels[0]).mean(axis=1),
        "majority_accuracy": np.full(len(design.C), counts.max() / len(rows)),
        "log_loss": -log_share[:, np.arange(len(rows)), labels[0]].mean(axis=1),
        "confusion": confusion,
    }  # fmt: skip
    return ClassCell(counts, "", per_fold, values)


def _solve(problem: Problem, design: ClassDesign) -> Solution:
    """A Solution whose coef and intercept are of columns, and whose other fields are of models.

    One against the rest is one problem too, whose objective is the sum over the classes.
    """
    c = len(design.classes)
    if design.multiclass == "softmax":
        return solve_softmax(problem, c, design.tol)
    found = solve_newton(problem, design.tol)
    objective, gap = (x.reshape(-1, c).sum(axis=1) for x in (found.objective, found.gap_bound))
    converged = found.converged.reshape(-1, c).all(axis=1)
    return Solution(found.coef, found.intercept, objective, gap, found.n_iter.reshape(-1, c).max(axis=1), converged)


def _class_weight(
    design: ClassDesign, one_hot: np.ndarray, weight: np.ndarray, column: dict[str, np.ndarray]
) -> np.ndarray | None:
    """(K, 2): of one against the rest, both sides balanced; of softmax, all classes."""
    balanced = column_class_weights(design.class_weight, one_hot, weight, **column)
    if balanced is None or design.multiclass == "ovr":
        return balanced
    return balanced * 2 / len(design.classes)


def _judge(scores: np.ndarray, multiclass: str) -> tuple[np.ndarray, np.ndarray]:
    """(what ranks samples for each class, log-probabilities), each (n, c), of scores (n, c)."""
    if multiclass == "softmax":
        # Log-odds, which order samples as probabilities do, and do not end at 0 and 1.
        others = [np.logaddexp.reduce(np.delete(scores, k, axis=1), axis=1) for k in range(scores.shape[1])]
        return scores - np.stack(others, axis=1), log_softmax(scores, axis=1)
    share = np.maximum(expit(scores), np.finfo(np.float64).tiny)
    return scores, np.log(share / share.sum(axis=1, keepdims=True))


def _has_all(labels: np.ndarray, n_classes: int, at_least: int) -> bool:
    return bool((np.bincount(labels, minlength=n_classes) >= at_least).all())


def _too_few(truth: np.ndarray, held: np.ndarray, weight: np.ndarray, design: ClassDesign) -> str:
    """Why these samples cannot be cross-validated, in one sentence; empty when they can."""
    if not len(truth):
        return "no sample has this token"
    for f, (out, weights) in enumerate(zip(held, weight, strict=True)):
        for k, name in enumerate(design.classes):
            if (count := int((truth[out] == k).sum())) < MIN_PER_FOLD:
                return (
                    f"too few samples: fold {f} of {design.n_folds} holds {count} of class {name!r}, at least "
                    f"{MIN_PER_FOLD} are needed ({int((truth == k).sum())} in all)"
                )
            if not weights[truth == k].any():
                return f"class {name!r} has no weight above 0 outside fold {f} of {design.n_folds}"
    return ""
