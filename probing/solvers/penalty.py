"""The elastic-net penalty of probes, and the duality gap under it.

    Omega(w) = l1_ratio ||w||_1 + 0.5 (1 - l1_ratio) ||w||^2

which is scikit-learn's, C being in the weights of the samples. With the intercept optimised, alpha_i = s_i sigma(-y_i z_i)
is feasible in the dual but for the bound that an l1 penalty puts on v = sum_i alpha_i y_i x_i. Either v is charged by the
conjugate of Omega, or alpha is scaled down until ||v||_inf <= l1_ratio (Koh, Kim and Boyd, "An interior-point method for
large-scale l1-regularized logistic regression", JMLR 8, 2007, section 3.2); the smaller gap is the certificate.
"""

import torch

from hiddenlake.cache.errors import ProbeError
from hiddenlake.kernels.logistic import Losses
from hiddenlake.probing.solvers.problem import Columns


def check_penalty(penalty: str, l1_ratio: float | None) -> float:
    """The share of `l2`, `l1` or `elasticnet` that is l1. Raises ProbeError where both do not go together."""
    if penalty in ("l2", "l1"):
        if l1_ratio is not None:
            raise ProbeError(f"penalty {penalty!r} has no l1_ratio ({l1_ratio}): leave it out, or say `elasticnet`")
        return float(penalty == "l1")
    if penalty != "elasticnet":
        raise ProbeError(f"unknown penalty {penalty!r}: expected `l2`, `l1` or `elasticnet`")
    if l1_ratio is None or not 0 < l1_ratio < 1:
        raise ProbeError(f"l1_ratio is {l1_ratio}: an elastic net needs a number between 0 and 1")
    return float(l1_ratio)


def omega(coef: torch.Tensor, l1_ratio: float) -> torch.Tensor:
    """(k,) Omega of (d, k) weights."""
    return l1_ratio * coef.abs().sum(0) + 0.5 * (1.0 - l1_ratio) * coef.square().sum(0)


def elastic_net_gap(columns: Columns, coef: torch.Tensor, gradient: torch.Tensor, at: Losses) -> torch.Tensor:
    """(k,) how far objectives can be above the optimum, where l1_ratio is above 0.

    coef, gradient : (d, k) float64 weights, and the gradient of the losses with respect to them, which is -v.
    at : the losses at their best intercept.
    """
    l1, l2, weight = columns.l1_ratio, 1.0 - columns.l1_ratio, columns.weights()
    share = torch.where(weight > 0, at.residual.abs() / weight, 0.0) * (l1 / gradient.abs().amax(0).clamp_min(l1))
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1.0 - share, 1.0 - share))
    # Where no |v_j| is above l1_ratio, the conjugate of Omega is 0.
    gap = (at.loss + omega(coef, l1) - (weight * entropy).sum(0)).clamp_min(0.0)
    if l2 == 0.0:
        return gap
    # At alpha itself the losses leave -v . w of the gap, and each feature's part is at least 0 (Fenchel and Young).
    conjugate = (gradient.abs() - l1).clamp_min(0.0).square().sum(0) / (2.0 * l2)
    return torch.minimum(gap, (omega(coef, l1) + conjugate + (gradient * coef).sum(0)).clamp_min(0.0))
