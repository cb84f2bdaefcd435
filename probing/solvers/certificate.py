"""The certificate of a fitted probe: how far its objective can be above the optimum.

With the intercept optimised, sum_i alpha_i y_i = 0 for alpha_i = s_i sigma(-y_i z_i), so alpha is
feasible in the dual, and the Fenchel duality gap is exactly half the squared norm of the gradient
with respect to the weights (Fenchel duality for l2-regularised losses: Rifkin and Lippert, "Value
regularization and Fenchel duality", JMLR 8, 2007):

    P(w) - P* <= 0.5 * ||w - sum_i alpha_i y_i x_i||^2 = 0.5 * ||grad_w P||^2

Penalties with an l1 part have theirs in hiddenlake.probing.solvers.penalty. It is evaluated in float64 from the stored rows, never from what a solver keeps while it runs.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from hiddenlake.kernels.logistic import Losses, logistic_losses
from hiddenlake.probing.solvers.penalty import elastic_net_gap, omega
from hiddenlake.probing.solvers.problem import Columns, Problem

# Samples of one class whose pairs with the other are looked at together.
_PAIRS = 1024

# Newton with a bracket converges quadratically; the bound only ends a search that rounding has stopped.
_INTERCEPT_STEPS = 100
_INTERCEPT_TOL = {torch.float64: 1e-12, torch.float32: 3e-6}


@dataclass(frozen=True, slots=True)
class Fitted:
    """Losses at given scores, with the intercept optimised. intercept : (k,)."""

    intercept: torch.Tensor
    at: Losses


@dataclass(frozen=True, slots=True)
class Intercepts:
    """Optimises the intercepts of columns in one dimension, at any scores.

    weight, inside : (n,) and (n, 1), of the rows.  sign : (n, k), 1 or -1.  strength : (2, k).
    total, log_odds : (k,), what all rows weigh, and the log of what the positive ones do over the others.
    """

    weight: torch.Tensor
    inside: torch.Tensor
    sign: torch.Tensor
    strength: torch.Tensor
    total: torch.Tensor
    log_odds: torch.Tensor

    @classmethod
    def of(cls, columns: Columns, dtype: torch.dtype) -> Self:
        """columns : of one fold.  dtype : of the scores."""
        sides = (columns.weight @ side.double() for side in (~columns.positive, columns.positive))
        negative, positive = (side * strength for side, strength in zip(sides, columns.strength, strict=True))
        return cls(
            columns.weight.to(dtype), (columns.weight > 0)[:, None], columns.positive.to(dtype).mul_(2.0).sub_(1.0),
            columns.strength.to(dtype),
            (negative + positive).to(dtype), (positive.log() - negative.log()).to(dtype),
        )  # fmt: skip

    def __getitem__(self, chosen: torch.Tensor) -> Self:
        """Of some of the columns."""
        return type(self)(
            self.weight, self.inside, self.sign[:, chosen].contiguous(), self.strength[:, chosen].contiguous(),
            self.total[chosen], self.log_odds[chosen],
        )  # fmt: skip

    def fit(self, scores: torch.Tensor, intercept: torch.Tensor) -> Fitted:
        """scores : (n, k) without intercept.  intercept : (k,) where to start."""
        # sum_i s_i sigma(z_i + b) = what the positive class weighs has its root between these two.
        low = self.log_odds - scores.masked_fill(~self.inside, -torch.inf).amax(0)
        high = self.log_odds - scores.masked_fill(~self.inside, torch.inf).amin(0)
        intercept = intercept.clamp(low, high)
        tol = _INTERCEPT_TOL[scores.dtype]
        for _ in range(_INTERCEPT_STEPS):
            at = logistic_losses(scores, intercept, self.sign, self.weight, self.strength)
            left = at.slope.abs() > tol * self.total
            if not left.any():
                break
            low, high = torch.where(at.slope < 0, intercept, low), torch.where(at.slope > 0, intercept, high)
            step = intercept - at.slope / torch.where(at.curve > 0, at.curve, 1.0)
            newton = (at.curve > 0) & (step > low) & (step < high)
            # One that is there stays: between its roundings a bracket says nothing.
            moved = torch.where(left, torch.where(newton, step, 0.5 * (low + high)), intercept)
            if torch.equal(moved, intercept):
                break
            intercept = moved
        return Fitted(intercept, at)


@dataclass(frozen=True, slots=True)
class Certificate:
    """objective, gap_bound, intercept : (k,). The objective is at most gap_bound above the optimum.

    scores : (n, k) of all rows, without intercept.
    """

    objective: torch.Tensor
    gap_bound: torch.Tensor
    intercept: torch.Tensor
    scores: torch.Tensor


def certify_columns(columns: Columns, coef: torch.Tensor, intercept: torch.Tensor) -> Certificate:
    """Certify weights that any solver found for columns of one fold.

    coef : (d, k) float64, in the scaled coordinates of the fold.  intercept : (k,), re-optimised here.
    """
    scores = columns.rows.scores(coef)
    fitted = Intercepts.of(columns, torch.float64).fit(scores, intercept)
    gradient = columns.rows.pull(fitted.at.residual)
    return Certificate(
        objective=fitted.at.loss + omega(coef, columns.l1_ratio),
        gap_bound=(
            elastic_net_gap(columns, coef, gradient, fitted.at)
            if columns.l1_ratio
            else 0.5 * gradient.add_(coef).square().sum(0)
        ),
        intercept=fitted.intercept,
        scores=scores,
    )


def certify(problem: Problem, coef: np.ndarray, intercept: np.ndarray) -> Certificate:
    """Certify weights that any solver found for a whole problem.

    coef : (d, K), in the scaled coordinates of the problem.  intercept : (K,), re-optimised here.
    """
    parts = []
    for fold, chosen in problem.by_fold():
        at = chosen.cpu().numpy()
        start, weights = (torch.as_tensor(x[..., at], device=problem.X.device).double() for x in (intercept, coef))
        parts.append((chosen, certify_columns(problem.columns(fold, chosen), weights, start)))
    order = torch.cat([chosen for chosen, _ in parts]).argsort()
    return Certificate(
        *(torch.cat([getattr(part, name) for _, part in parts], -1)[..., order] for name in Certificate.__slots__)
    )


def certified_auc(
    scores: np.ndarray, positive: np.ndarray, rows: np.ndarray, same: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Between which values the AUC of the optimum lies, given how far each probe can be from it.

    scores : (n, k) float64 of held-out samples.  positive : (n,) bool, with both classes.
    rows : (n, d) float64, the samples in the coordinates of the weights.  same : (n,) int, equal for equal rows.
    radius : (k,) sqrt(2 gap_bound) under an l2 penalty, the largest ||w - w*||; infinite where none is known.

    At the optimum the scores of two samples differ by what they differ by here, give or take radius ||x - x'|| (Cauchy and
    Schwarz). A pair whose order may change counts for either side; equal rows tie in any case.

    Returns (low, high), each (k,).
    """
    won, lost = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    others, squares = rows[~positive], (rows[~positive] ** 2).sum(1)
    members = np.flatnonzero(positive)
    for part in np.split(members, range(_PAIRS, len(members), _PAIRS)):
        mine = rows[part]
        distance = np.sqrt(np.maximum((mine**2).sum(1)[:, None] + squares - 2.0 * mine @ others.T, 0.0))
        tied = 0.5 * (same[part][:, None] == same[~positive]).sum()
        for k, r in enumerate(radius):
            difference = scores[part, k][:, None] - scores[~positive, k]
            with np.errstate(invalid="ignore"):  # an infinite radius times 0: neither won nor lost
                reach = r * distance
            won[k] += (difference > reach).sum() + tied
            lost[k] += (difference < -reach).sum() + tied
    pairs = len(members) * len(others)
    return won / pairs, 1.0 - lost / pairs
