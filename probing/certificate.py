"""The certificate of a fitted probe: how far its objective can be above the optimum.

With the intercept optimised, sum_i alpha_i y_i = 0 for alpha_i = C s_i sigma(-y_i z_i), so alpha is
feasible in the dual, and the Fenchel duality gap is exactly half the squared norm of the gradient
with respect to the weights (Fenchel duality for l2-regularised losses: Rifkin and Lippert, "Value
regularization and Fenchel duality", JMLR 8, 2007):

    P(w) - P* <= 0.5 * ||w - sum_i alpha_i y_i x_i||^2 = 0.5 * ||grad_w P||^2

It is evaluated in float64 from the stored rows, never from what a solver keeps while it runs.
"""

from dataclasses import dataclass

import numpy as np

from hiddenlake.probing.solvers.problem import Problem

# Newton with a bracket converges quadratically; the bound only ends a search that rounding has stopped.
_INTERCEPT_STEPS = 100
_INTERCEPT_TOL = 1e-13


@dataclass(frozen=True, slots=True)
class Losses:
    """Value and derivatives of the loss at given scores, with the intercept optimised.

    loss, intercept : (k,).  residual, curvature : (n, k) first and second derivative per row.
    """

    loss: np.ndarray
    intercept: np.ndarray
    residual: np.ndarray
    curvature: np.ndarray


def losses(scores: np.ndarray, intercept: np.ndarray, sign: np.ndarray, weight: np.ndarray) -> Losses:
    """Optimise the intercept of each column in one dimension, then evaluate the loss there.

    scores : (n, k) without intercept.  intercept : (k,) where to start.  sign, weight : (n, k) as in Problem.

    Both classes must have weight in every column.
    """
    total = weight.sum(axis=0)
    positive = (weight * (sign > 0)).sum(axis=0)
    inside = weight > 0
    # sum_i s_i sigma(z_i + b) = positive has its root between these two.
    log_odds = np.log(positive) - np.log(total - positive)
    low = log_odds - np.where(inside, scores, -np.inf).max(axis=0)
    high = log_odds - np.where(inside, scores, np.inf).min(axis=0)
    intercept = np.clip(intercept, low, high)
    for _ in range(_INTERCEPT_STEPS):
        margin, decay, residual, curvature = _derivatives(scores + intercept, sign, weight)
        slope = residual.sum(axis=0)
        if (np.abs(slope) <= _INTERCEPT_TOL * total).all():
            break
        low = np.where(slope < 0, intercept, low)
        high = np.where(slope > 0, intercept, high)
        bend = curvature.sum(axis=0)
        step = intercept - slope / np.where(bend > 0, bend, 1.0)
        moved = np.where((bend > 0) & (step > low) & (step < high), step, 0.5 * (low + high))
        if (moved == intercept).all():
            break
        intercept = moved
    loss = (weight * (np.log1p(decay) + np.maximum(-margin, 0.0))).sum(axis=0)
    return Losses(loss, intercept, residual, curvature)


def _derivatives(
    scores: np.ndarray, sign: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    margin = sign * scores
    decay = np.exp(-np.abs(margin))
    shrink = 1.0 / (1.0 + decay)
    wrong = np.where(margin >= 0, decay * shrink, shrink)  # sigma(-margin), without overflow
    return margin, decay, -weight * sign * wrong, weight * decay * shrink * shrink


@dataclass(frozen=True, slots=True)
class Certificate:
    """objective, gap_bound, intercept : (k,). The objective is at most gap_bound above the optimum."""

    objective: np.ndarray
    gap_bound: np.ndarray
    intercept: np.ndarray


def certify(problem: Problem, coef: np.ndarray, intercept: np.ndarray) -> Certificate:
    """Certify weights that any solver found.

    coef : (d, K), in the scaled coordinates of the problem.  intercept : (K,), re-optimised here.
    """
    at = losses(problem.scores(coef), intercept, problem.sign, problem.weight)
    gradient = coef + problem.pull(at.residual)
    return Certificate(
        objective=at.loss + 0.5 * (coef**2).sum(axis=0),
        gap_bound=0.5 * (gradient**2).sum(axis=0),
        intercept=at.intercept,
    )
