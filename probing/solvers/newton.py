"""Newton: preconditioned Newton-CG over all columns at once, with exact Newton behind it.

The intercept is eliminated: every value of the objective is at its best intercept, so that the
Hessian is a Schur complement and the gradient is the certificate's (hiddenlake.probing.certificate).
"""

import numpy as np

from hiddenlake.probing.certificate import Losses, certify, losses
from hiddenlake.probing.solvers.preconditioner import Preconditioner, ridge_solver
from hiddenlake.probing.solvers.problem import Problem, Solution

# Preconditioned CG needs 5 to 30 products for a step on activations; what needs more than this is
# better served by the exact Hessian.
_MAX_CG = 60
_MAX_NEWTON_CG = 25
_MAX_EXACT = 200
_ARMIJO = 1e-4
_MIN_STEP = 2.0**-40


def solve_newton(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit all columns until gap_bound <= tol * objective, in float64.

    Columns that CG leaves above their tolerance are finished by exact Newton steps with a line
    search. `converged` is decided by the certificate, computed afresh from the rows.
    """
    coef, intercept, n_iter = _newton_cg(problem, tol)
    certificate = certify(problem, coef, intercept)
    for column in np.flatnonzero(~(certificate.gap_bound <= tol * certificate.objective)):
        coef[:, column], steps = _exact_newton(problem, column, coef[:, column], tol)
        n_iter[column] += steps
        certificate = certify(problem, coef, certificate.intercept)
    return Solution(
        coef=coef,
        intercept=certificate.intercept,
        objective=certificate.objective,
        gap_bound=certificate.gap_bound,
        n_iter=n_iter,
        converged=certificate.gap_bound <= tol * certificate.objective,
    )


def _newton_cg(problem: Problem, tol: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d, n_columns = problem.rows.shape[1], len(problem.fold)
    out = np.zeros((d, n_columns))
    out_intercept = np.zeros(n_columns)
    n_iter = np.zeros(n_columns, int)
    preconditioner = Preconditioner(problem)
    active = np.arange(n_columns)
    coef = np.zeros((d, n_columns))
    scores = np.zeros_like(problem.sign)
    at = losses(scores, np.zeros(n_columns), problem.sign, problem.weight)
    for _ in range(_MAX_NEWTON_CG):
        objective = at.loss + 0.5 * (coef**2).sum(axis=0)
        gradient = coef + problem.pull(at.residual, active)
        # A tenth of the tolerance is kept back: the certificate has other roundings than these scores.
        target = np.sqrt(2.0 * 0.9 * tol * objective)
        norm = np.linalg.norm(gradient, axis=0)
        left = norm > target
        out[:, active], out_intercept[active] = coef, at.intercept
        if not left.any():
            break
        if not left.all():
            active, coef, scores, objective, gradient = (
                active[left], coef[:, left], scores[:, left], objective[left], gradient[:, left]
            )  # fmt: skip
            target, norm = target[left], norm[left]
            at = Losses(at.loss[left], at.intercept[left], at.residual[:, left], at.curvature[:, left])
        # The forcing term of an inexact Newton step: loose while far away, quadratic near by
        # (Eisenstat and Walker 1996), and never tighter than what the tolerance needs.
        accuracy = np.maximum(np.minimum(0.1, norm / np.sqrt(2.0 * objective)) * norm, 0.5 * target)
        step, step_scores = _cg(problem, preconditioner, active, gradient, at.curvature, accuracy)
        coef, scores, at, moved = _line_search(
            coef, scores, step, step_scores, objective, (gradient * step).sum(axis=0), at,
            problem.sign[:, active], problem.weight[:, active],
        )  # fmt: skip
        n_iter[active] += 1
        if not moved.any():
            break
    out[:, active], out_intercept[active] = coef, at.intercept
    return out, out_intercept, n_iter


def _cg(
    problem: Problem,
    preconditioner: Preconditioner,
    columns: np.ndarray,
    gradient: np.ndarray,
    curvature: np.ndarray,
    accuracy: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Solve H step = -gradient until the residual's norm is at most `accuracy`. (d, k), and (n, k) its scores."""
    total = curvature.sum(axis=0)
    c = total / len(problem.rows)
    residual = -gradient
    step = np.zeros_like(gradient)
    step_scores = np.zeros_like(curvature)
    direction = conditioned = preconditioner.apply(residual, c)
    product = (residual * conditioned).sum(axis=0)
    for _ in range(_MAX_CG):
        forward = problem.scores(direction, columns)
        curved = curvature * forward
        curved -= curvature * (curved.sum(axis=0) / np.where(total > 0, total, 1.0))
        hessian = direction + problem.pull(curved, columns)
        bend = (direction * hessian).sum(axis=0)
        going = (np.linalg.norm(residual, axis=0) > accuracy) & (bend > 0)
        if not going.any():
            break
        length = np.where(going, product / np.where(bend > 0, bend, 1.0), 0.0)
        step += length * direction
        step_scores += length * forward
        residual -= length * hessian
        if (np.linalg.norm(residual, axis=0) <= accuracy).all():
            break
        conditioned = preconditioner.apply(residual, c)
        renewed = (residual * conditioned).sum(axis=0)
        direction = conditioned + np.where(product > 0, renewed / np.where(product > 0, product, 1.0), 0.0) * direction
        product = renewed
    return step, step_scores


def _line_search(
    coef: np.ndarray,
    scores: np.ndarray,
    step: np.ndarray,
    step_scores: np.ndarray,
    objective: np.ndarray,
    slope: np.ndarray,
    at: Losses,
    sign: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Losses, np.ndarray]:
    """Halve each column's step until its objective falls enough (Armijo).

    coef, step : (d, k).  scores, step_scores : (n, k).  objective, slope : (k,) value and directional derivative.

    Returns coef, scores and losses where each column has gone, and (k,) bool, whether it has: a column
    without progress stays where it is.
    """
    length = np.ones_like(objective)
    while True:
        moved_coef, moved_scores = coef + length * step, scores + length * step_scores
        moved = losses(moved_scores, at.intercept, sign, weight)
        reached = moved.loss + 0.5 * (moved_coef**2).sum(axis=0)
        # Close to the optimum the decrease is lost in rounding: there the Newton step is trusted.
        enough = reached <= objective + _ARMIJO * length * slope + 1e-13 * objective
        if enough.all() or length.min() < _MIN_STEP:
            break
        length = np.where(enough, length, 0.5 * length)
    if not enough.all():
        moved_coef, moved_scores = np.where(enough, moved_coef, coef), np.where(enough, moved_scores, scores)
        moved = losses(moved_scores, at.intercept, sign, weight)
    return moved_coef, moved_scores, moved, enough & (length >= _MIN_STEP)


def _exact_newton(problem: Problem, column: int, coef: np.ndarray, tol: float) -> tuple[np.ndarray, int]:
    """Newton with the exact Hessian and a line search, from coef (d,). Returns the new coef and the steps made."""
    one = np.array([column])
    sign, weight = problem.sign[:, one], problem.weight[:, one]
    inside = weight[:, 0] > 0
    A = problem.rows[inside] * problem.unit[problem.fold[column]]
    coef = coef[:, None]
    scores = problem.scores(coef, one)
    at = losses(scores, np.zeros(1), sign, weight)
    for steps in range(_MAX_EXACT):
        objective = at.loss + 0.5 * (coef**2).sum(axis=0)
        gradient = coef + problem.pull(at.residual, one)
        if 0.5 * float((gradient**2).sum()) <= 0.5 * tol * float(objective[0]):
            break
        # H = I + A^T (D - D D^T / sum D) A = I + B^T B with B = (I - q q^T) sqrt(D) A, q = sqrt(D) / ||sqrt(D)||
        root = np.sqrt(at.curvature[inside, 0])
        B = root[:, None] * A
        if (norm := float(np.linalg.norm(root))) > 0:
            B -= np.outer(root / norm, (root / norm) @ B)
        step = -ridge_solver(B)(gradient)
        coef, scores, at, moved = _line_search(
            coef, scores, step, problem.scores(step, one), objective, (gradient * step).sum(axis=0), at, sign, weight
        )
        if not moved.all():
            break
    return coef[:, 0], steps + 1
