"""Design: what is the same in every cell of a grid: labels, folds, values of C, and how they are solved for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.controls import shuffle_labels
from hiddenlake.probing.solvers.cuml import solve_cuml
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.penalised import solve_penalised
from hiddenlake.probing.solvers.penalty import check_penalty
from hiddenlake.probing.solvers.place import check_device
from hiddenlake.probing.solvers.problem import Problem, Solution
from hiddenlake.probing.solvers.scikit import solve_scikit
from hiddenlake.probing.splits import make_folds
from hiddenlake.probing.weights import ClassWeight, check_class_weight, check_sample_weight

Solver = Callable[[Problem, float], Solution]

SOLVERS: dict[str, Solver] = {
    "auto": solve_newton,
    "newton": solve_newton,
    "sklearn": solve_scikit,
    "cuml": solve_cuml,
}
# Of penalties with an l1 part.
L1_SOLVERS: dict[str, Solver] = {
    "auto": solve_penalised,
    "sklearn": solve_penalised,
    "cuml": solve_cuml,
}


def solver_of(name: str, l1_ratio: float) -> Solver:
    """Raises ProbeError for one that there is not, or that has no such penalty."""
    if name not in SOLVERS:
        raise ProbeError(f"unknown solver {name!r}: expected one of {', '.join(SOLVERS)}")
    if l1_ratio and name not in L1_SOLVERS:
        raise ProbeError(f"solver {name!r} has no l1 penalty: expected one of {', '.join(L1_SOLVERS)}")
    return (L1_SOLVERS if l1_ratio else SOLVERS)[name]


@dataclass(frozen=True, slots=True)
class Design:
    """What is the same in every cell of a grid.

    labels : (L, sample) bool, the real labels first, then shuffles.  others : (S, position, sample) bool, label sets that
    each position has of its own, fitted beside them.  fold : (sample,) int, the fold that holds a sample out, -1 for
    those that are left out.  order : (sample,) int, the samples by their names.
    C : (C,).  group : (sample,) int where groups repeat, which asks for the grouped bootstrap, or None.
    sample_weight : (sample,) float64, what each counts in a fit.  class_weight, nested : as in fit_probes.
    l1_ratio : the share of the penalty that is l1.
    columns_at_once : of a fold, solved for together; None for all.  device : where.
    """

    labels: np.ndarray
    others: np.ndarray
    fold: np.ndarray
    order: np.ndarray
    n_folds: int
    C: np.ndarray
    group: np.ndarray | None
    scale: str
    solver: str
    tol: float
    seed: int
    sample_weight: np.ndarray
    class_weight: ClassWeight
    l1_ratio: float
    nested: bool
    device: str = "cpu"
    columns_at_once: int | None = None

    def __post_init__(self) -> None:
        solver_of(self.solver, self.l1_ratio)
        check_device(self.device)
        if not len(self.C) or not (np.isfinite(self.C).all() and (self.C > 0).all()):
            raise ProbeError(f"C is {self.C.tolist()}: expected one or more numbers above 0")
        if not self.tol > 0:
            raise ProbeError(f"tol is {self.tol}: expected a number above 0, e.g. 1e-6")
        if self.nested and self.n_folds < 3:
            raise ProbeError(f"cv is {self.n_folds}: a nested choice needs 3 folds or more, or nested=False")

    def label_sets(self, position: int) -> np.ndarray:
        """(L + S, sample) bool, of the cells at a position, by its number."""
        return np.concatenate([self.labels, self.others[:, position]]) if len(self.others) else self.labels

    @property
    def interval(self) -> str:
        """How the intervals are made, in words."""
        return "95 %, DeLong over folds" if self.group is None else "95 %, bootstrap of whole groups"

    @property
    def solver_name(self) -> str:
        if self.solver != "auto":
            return self.solver
        return "sklearn" if self.l1_ratio else "newton"


def make_design(
    positive: np.ndarray,
    *,
    kept: np.ndarray,
    names: np.ndarray,
    groups: np.ndarray,
    C: float | Sequence[float],
    cv: int,
    scale: str,
    solver: str,
    tol: float,
    shuffles: int,
    seed: int,
    sample_weight: Sequence | np.ndarray | None = None,
    class_weight: ClassWeight = None,
    penalty: str = "l2",
    l1_ratio: float | None = None,
    nested: bool = False,
    others: np.ndarray | None = None,
    device: str = "cpu",
) -> Design:
    """Folds and shuffles of the samples that are kept.

    positive, kept : (sample,) bool.  names : (sample,) distinct, which folds and shuffles follow.
    groups : (sample,) names that stay on one side of every split.  The others are fit_probes's.

    Raises ProbeError when the samples cannot be split.
    """
    n = len(positive)
    check_names(names, shuffles)
    design = Design(
        labels=np.zeros((1 + shuffles, n), bool),
        others=np.zeros((0, 0, n), bool) if others is None else others,
        fold=np.full(n, -1),
        # Sums are rounded in the order of the samples: by their names, it is the same whatever order they arrived in.
        order=np.argsort(names.astype(str), kind="stable"),
        n_folds=cv,
        C=np.atleast_1d(np.asarray(C, np.float64)),
        group=repeating(groups, kept),
        scale=scale,
        solver=solver,
        tol=tol,
        seed=seed,
        sample_weight=check_sample_weight(np.ones(n) if sample_weight is None else sample_weight, positive, kept),
        class_weight=check_class_weight(class_weight),
        l1_ratio=check_penalty(penalty, l1_ratio),
        nested=nested,
        device=device,
    )
    design.fold[kept] = make_folds(positive[kept], n_folds=cv, groups=groups[kept], seed=seed)
    design.labels[0] = positive
    together = None if design.group is None else groups[kept]
    design.labels[1:, kept] = shuffle_labels(positive[kept], names[kept], groups=together, n=shuffles, seed=seed)
    return design


def check_names(names: np.ndarray, shuffles: int) -> None:
    """Raises ProbeError for names that are not distinct, and for fewer than no shuffles."""
    if shuffles < 0:
        raise ProbeError(f"shuffles is {shuffles}: expected 0 or more")
    if len(set(names.tolist())) < len(names):
        raise ProbeError(
            f"index names {len(set(names.tolist()))} of {len(names)} samples: give each its own, and say what belongs "
            f"together with `groups`"
        )


def repeating(groups: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
    """Group numbers when some group has several samples, else None."""
    _, member = np.unique(groups.astype(str), return_inverse=True)
    return member if len(set(member[kept].tolist())) < int(kept.sum()) else None
