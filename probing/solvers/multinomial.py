"""Multinomial losses of many models on the same rows, their best intercepts, and the certificate.

A model of c classes is c columns of a Problem, one after the other: those of its classes against all others, with one fold and
one C. It minimises, as scikit-learn's multinomial does,

    sum_i s_i (log sum_j exp(z_ij) - z_i,y_i) + 0.5 ||W||^2,   z = X (W * unit) + b,   b free,

where s_i is C, times the weights of the sample and of its class. With R_ij = s_i (p_ij - [y_i = j]) and the intercepts
optimised, every column of R sums to 0, so that -R is feasible in the dual, and the duality gap is the binary one's
(hiddenlake.probing.solvers.certificate) with a matrix for w: P - P* <= 0.5 ||W + X^T R||^2.

Shape letters: n rows, d features, k models, c classes.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from hiddenlake.probing.solvers.problem import Columns, ScaledRows

# Where an objective changes by less than this, relatively, the change is lost in rounding.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}

_INTERCEPT_STEPS = 100
_FEASIBLE = 1e-11
_INTERCEPT_TOL = {torch.float32: 3e-6, torch.float64: 1e-13}


class Evaluated(NamedTuple):
    """intercept : (k, c).  loss : (k,).  share, residual : (n, k, c), p and R."""

    intercept: torch.Tensor
    loss: torch.Tensor
    share: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True, slots=True)
class Models:
    """k models on the same rows. weight : (n, k), s.  truth : (n, k, 1) int64, the class of each row."""

    rows: ScaledRows
    weight: torch.Tensor
    truth: torch.Tensor
    n_classes: int

    @classmethod
    def of(cls, columns: Columns, n_classes: int) -> Self:
        positive = columns.positive.unflatten(1, (-1, n_classes))
        if not (positive.sum(2) == 1).all():
            raise ValueError(f"{n_classes} columns of a model give some row another number of classes than one")
        truth = positive.byte().argmax(2, keepdim=True)
        strength = columns.strength[1].unflatten(0, (-1, n_classes)).expand(len(truth), -1, -1)
        return cls(columns.rows, columns.weight[:, None] * strength.gather(2, truth)[..., 0], truth, n_classes)

    def __getitem__(self, chosen: torch.Tensor) -> Self:
        return type(self)(self.rows, self.weight[:, chosen], self.truth[:, chosen], self.n_classes)

    def training(self) -> Self:
        inside = (self.weight > 0).any(1).nonzero().ravel()
        return type(self)(self.rows.take(inside), self.weight[inside], self.truth[inside], self.n_classes)

    def losses(self, scores: torch.Tensor, intercept: torch.Tensor) -> Evaluated:
        """scores : (n, k, c) without intercept."""
        weight = self.weight.to(scores.dtype)
        log_share = (scores + intercept).log_softmax(2)
        loss = -(weight * log_share.gather(2, self.truth)[..., 0]).sum(0)
        share = log_share.exp_()
        residual = (weight[..., None] * share).scatter_add_(2, self.truth, -weight[..., None])
        return Evaluated(intercept, loss, share, residual)

    def fit_intercepts(self, scores: torch.Tensor, intercept: torch.Tensor) -> Evaluated:
        """The losses at their best intercepts, which sum to 0. intercept : (k, c), where to start."""
        weight, tol = self.weight.to(scores.dtype), _INTERCEPT_TOL[scores.dtype] * self.weight.sum(0)[:, None]
        wanted = weight.new_zeros(intercept.shape).scatter_add_(1, self.truth[..., 0].mT, weight.mT.contiguous())
        at = self.losses(scores, intercept)
        for _ in range(_INTERCEPT_STEPS):
            slope = at.residual.sum(0)
            if (slope.abs() <= tol).all():
                break
            step = -(bend(at.share, weight) @ slope[..., None].double())[..., 0].to(scores.dtype)
            there = self.losses(scores, at.intercept + step)
            better = (there.loss <= at.loss * (1.0 + ROUNDING[scores.dtype])) & (
                there.residual.sum(0).abs().amax(1) <= 0.5 * slope.abs().amax(1)
            )
            if not better.all():
                # Where Newton overshoots, or sees no curvature: shares scaled to what they are to sum to never raise the loss, because
                # log sum_j p_j exp(d_j) <= sum_j p_j exp(d_j) - 1.
                log_share = (scores + at.intercept).log_softmax(2) + weight.log()[..., None]
                step = torch.where(better[:, None], step, wanted.log() - log_share.logsumexp(0))
                there = self.losses(scores, at.intercept + step)
            if torch.equal(there.intercept, at.intercept):
                break
            at = there
        return at._replace(intercept=at.intercept - at.intercept.mean(1, keepdim=True))


def bend(share: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(k, c, c) float64 pseudo-inverse of the losses' second derivative by the intercepts."""
    weighted = weight[..., None] * share
    second = torch.diag_embed(weighted.sum(0)) - torch.einsum("nkc,nke->kce", weighted, share)
    return torch.linalg.pinv(second.double(), hermitian=True)


def certify_softmax(models: Models, coef: torch.Tensor, intercept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(objective, gap bound, each (k,), intercepts (k, c)) of weights that any solver found, from the rows as stored.

    coef : (d, k * c) float64.  intercept : (k, c), optimised here.
    """
    shape = (-1, models.n_classes)
    at = models.fit_intercepts(models.rows.scores(coef).unflatten(1, shape), intercept)
    gradient = models.rows.pull(at.residual.flatten(1)).add_(coef)
    square, bound = (0.5 * x.square().sum(0).unflatten(0, shape).sum(1) for x in (coef, gradient))
    # Intercepts that are not the best leave a point that is not feasible in the dual, and no bound.
    feasible = at.residual.sum(0).abs().amax(1) <= _FEASIBLE * models.weight.sum(0)
    return at.loss + square, torch.where(feasible, bound, torch.inf), at.intercept
