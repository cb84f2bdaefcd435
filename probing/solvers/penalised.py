"""L1 and elastic net on each column: Newton steps whose model scikit-learn's coordinate descent minimises.

A proximal Newton method (Friedman, Hastie and Tibshirani, "Regularization paths for generalized linear models via coordinate
descent", J. Stat. Softw. 33, 2010; with the line search of Lee, Sun and Saunders, SIAM J. Optim. 24, 2014): at w, with the
intercept eliminated, the losses are replaced by their quadratic model 0.5 ||B u - t||^2, and an elastic net of B on t says
where to go. Each step is as accurate as the duality gap that it starts from asks for.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path

from hiddenlake.probing.solvers.certificate import Intercepts, certify, certify_columns
from hiddenlake.probing.solvers.penalty import omega
from hiddenlake.probing.solvers.problem import Columns, Problem, Solution

_MAX_STEPS = 100
# Passes over the features in one step. What is left is the next step's.
_MAX_PASSES = 2000
_ARMIJO = 1e-4
_MIN_STEP = 2.0**-30
_ROUNDING = 1e-13

# A row's curvature, relative to its weight, below which a confident mistake would be divided by next to nothing.
_FLAT = 1e-8


def solve_penalised(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit each column of a problem whose l1_ratio is above 0, along the path of growing C.

    One column after the other, on the CPU, with two float64 copies of a fold's training rows. `converged` is decided by the
    certificate (hiddenlake.probing.solvers.penalty).
    """
    d, n_columns = problem.X.shape[1], len(problem.fold)
    coef, intercept, n_iter = np.zeros((d, n_columns)), np.zeros(n_columns), np.zeros(n_columns, int)
    for fold, chosen in problem.by_fold():
        chosen = chosen.cpu()
        training = problem.columns(fold, chosen.to(problem.X.device)).training().cpu()
        A = training.rows.matrix(torch.float64)
        label_set, strength = problem.label_set.cpu()[chosen], training.strength.amax(0)
        for labels in label_set.unique():
            w, b = torch.zeros(d, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            members = (label_set == labels).nonzero().ravel()
            for one in members[strength[members].argsort()].tolist():
                w, b, steps = _column(training[torch.tensor([one])], A, w, b, tol)
                column = int(chosen[one])
                coef[:, column], intercept[column], n_iter[column] = w[:, 0].numpy(), float(b), steps
    found = certify(problem, coef, intercept)
    objective, gap, intercept = (x.cpu().numpy() for x in (found.objective, found.gap_bound, found.intercept))
    return Solution(coef, intercept, objective, gap, n_iter, gap <= tol * objective)


def _column(
    training: Columns, A: torch.Tensor, w: torch.Tensor, b: torch.Tensor, tol: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(w, b, steps), from a w (d, 1) and b (1,). A : (n, d) float64, the training rows."""
    l1_ratio = training.l1_ratio
    intercepts = Intercepts.of(training, torch.float64)
    weight = training.weights()
    for step in range(_MAX_STEPS):
        at = certify_columns(training, w, b)
        fitted = intercepts.fit(at.scores, at.intercept)
        b, gap, objective = fitted.intercept, float(at.gap_bound), float(at.objective)
        # A part is kept back: the certificate of all rows has other roundings.
        if gap <= 0.5 * tol * objective:
            return w, b, step
        curvature = torch.maximum(fitted.at.curvature, _FLAT * weight)
        root = curvature.sqrt()
        B, q = root * A, root / root.norm()
        B -= q @ (q.mT @ B)
        target = B @ w - fitted.at.residual / root
        target -= q @ (q.mT @ target)
        u = _elastic_net(B, target, w, l1_ratio, 0.1 * max(gap, tol * objective))
        direction, gradient = u - w, A.mT @ fitted.at.residual
        fall = float((gradient * direction).sum() + omega(u, l1_ratio) - omega(w, l1_ratio))
        scores, along, length = at.scores, A @ direction, 1.0
        while length >= _MIN_STEP:
            moved = w + length * direction
            there = intercepts.fit(scores + length * along, b)
            reached = float(there.at.loss + omega(moved, l1_ratio))
            if reached <= objective * (1.0 + _ROUNDING) + _ARMIJO * length * fall:
                break
            length *= 0.5
        else:
            return w, b, step
        w, b = moved, there.intercept
    return w, b, _MAX_STEPS


def _elastic_net(
    B: torch.Tensor, target: torch.Tensor, start: torch.Tensor, l1_ratio: float, gap: float
) -> torch.Tensor:
    """(d, 1) minimiser of 0.5 ||B u - target||^2 + Omega(u), to within a duality gap."""
    with warnings.catch_warnings():  # of coordinate descent, which overwrites where it starts
        # A step that stopped early is a shorter step; the certificate decides.
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, found, _ = enet_path(
            np.asfortranarray(B.numpy()), target[:, 0].numpy(), l1_ratio=l1_ratio, alphas=[1.0 / len(B)],
            coef_init=start[:, 0].numpy().copy(), tol=gap / max(float(target.square().sum()), 1e-300), max_iter=_MAX_PASSES,
        )  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(found))
