"""Softmax: multinomial logistic regressions of one fold at once, by Newton steps, under a certificate.

The losses and the certificate are those of hiddenlake.probing.solvers.multinomial.

Steps are solved for in float32, then, where the certificate does not hold, in float64, in the coordinates of
hiddenlake.probing.solvers.spaces: those in which I + c A^T A is the identity. With fewer rows than features, A is first
turned into the triangle of its QR decomposition, which has the same scores and norms.

Shape letters: n rows, m coordinates, k models, c classes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hiddenlake.probing.solvers.multinomial import ROUNDING, Models, bend, certify_softmax
from hiddenlake.probing.solvers.problem import Problem, Solution

_MAX_NEWTON = 50
_MAX_STEPS = 200
_ARMIJO = 1e-4
_MIN_STEP = 2.0**-30

# A factorisation serves all curvatures within this factor (hiddenlake.probing.solvers.spaces).
_REACH = 4.0


class _Space:
    """A : (n, m) of the training rows in one precision.  turn : (d, m) or None, from its coordinates to the weights'."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.A, self.turn = rows, None
        if rows.shape[0] < rows.shape[1]:
            self.turn, triangle = torch.linalg.qr(rows.mT)
            self.A = triangle.mT.contiguous()
        self._gram = (self.A.mT @ self.A).double()
        self._c = None

    def coef(self, state: torch.Tensor) -> torch.Tensor:
        """(d, k * c) float64 weights of a state (m, k, c)."""
        state = state.flatten(1)
        return (state if self.turn is None else self.turn @ state).double()

    def state(self, coef: torch.Tensor, k: int) -> torch.Tensor:
        coef = coef.to(self.A.dtype)
        return (coef if self.turn is None else self.turn.mT @ coef).unflatten(1, (k, -1))

    def prepare(self, c: float) -> bool:
        """Whether there are coordinates F = A L^-T with L L^T = I + c A^T A in this precision."""
        if self._c is None or not 1 / _REACH <= c / self._c <= _REACH:
            H = c * self._gram
            H.diagonal().add_(1.0)
            L, info = torch.linalg.cholesky_ex(H)
            if int(info):
                return False
            self._c, self.L = c, L.to(self.A.dtype)
            self.F = torch.linalg.solve_triangular(self.L, self.A.mT, upper=False).mT.contiguous()
        return True

    def step(self, gradient: torch.Tensor, curvature: "_Curvature", accuracy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(step, (m, k, c), what the scores change by) by conjugate gradients, each model with its own lengths."""
        F, c = self.F, self._c

        def product(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            forward = (F @ x.flatten(1)).view(-1, *x.shape[1:])
            return forward, x + (F.mT @ (curvature(forward) - c * forward).flatten(1)).view_as(x)

        rest = -torch.linalg.solve_triangular(self.L, gradient.flatten(1), upper=False).view_as(gradient)
        u, Fu = torch.zeros_like(rest), torch.zeros_like(curvature.share)
        direction, norm = rest.clone(), _square(rest)
        goal = accuracy.square() * norm
        for _ in range(_MAX_STEPS):
            forward, turned = product(direction)
            bend = (direction * turned).sum((0, 2))
            going = (norm > goal) & (bend > 0)
            if not going.any():
                break
            length = torch.where(going, norm / bend, 0.0)[:, None]
            u.addcmul_(direction, length)
            Fu.addcmul_(forward, length)
            rest.addcmul_(turned, length, value=-1.0)
            renewed = _square(rest)
            direction = torch.addcmul(rest, direction, torch.where(going, renewed / norm, 0.0)[:, None])
            norm = torch.where(going, renewed, norm)
        return torch.linalg.solve_triangular(self.L.mT, u.flatten(1), upper=True).view_as(u), Fu


@dataclass(frozen=True, slots=True)
class _Curvature:
    """Second derivative of the losses at their best intercepts. share : (n, k, c).  weight : (n, k, 1)."""

    share: torch.Tensor
    weight: torch.Tensor
    bend: torch.Tensor

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """(n, k, c) change of the residual for a change of the scores."""
        change = self._fixed(scores)
        shift = (self.bend @ change.sum(0)[..., None].double())[..., 0].to(scores.dtype)
        return change - self._fixed(shift.expand_as(scores))

    def _fixed(self, scores: torch.Tensor) -> torch.Tensor:
        moved = self.share * scores
        return self.weight * (moved - self.share * moved.sum(2, keepdim=True))

    def mean(self) -> float:
        """Of its eigenvalues, geometric over the models; that of equal scores in all classes, which is 0, is left out."""
        spread = (1.0 - self.share.square().sum(2)) / (self.share.shape[2] - 1)
        return float((self.weight[..., 0] * spread).mean(0).clamp_min(1e-30).log().mean().exp())


def _square(x: torch.Tensor) -> torch.Tensor:
    """(k,) of (m, k, c)."""
    return x.square().sum((0, 2))


def solve_softmax(problem: Problem, n_classes: int, tol: float = 1e-6) -> Solution:
    """Fit all models until gap_bound <= tol * objective, each C from where the one before ended.

    problem : n_classes columns a model, whose label sets are its classes, in order.

    Returns a Solution whose coef is (d, K) and intercept (K,) of the problem's columns, and whose other fields are (k,) of the
    models. `converged` is decided by the certificate, in float64, computed afresh from the rows.
    """
    d, K = problem.X.shape[1], len(problem.fold)
    k = K // n_classes
    out = Solution(
        np.zeros((d, K)), np.zeros(K), np.zeros(k), np.zeros(k), np.zeros(k, int), np.zeros(k, bool)
    )  # fmt: skip
    for fold, chosen in problem.by_fold():
        models = Models.of(problem.columns(fold, chosen), n_classes)
        label_set = problem.label_set[chosen].view(-1, n_classes)[:, 0]
        columns, which = chosen.cpu().numpy(), chosen.view(-1, n_classes)[:, 0].cpu().numpy() // n_classes
        coef, intercept, objective, gap, n_iter = (x.cpu().numpy() for x in _solve_fold(models, label_set, tol))
        out.coef[:, columns], out.intercept[columns] = coef, intercept.ravel()
        out.objective[which], out.gap_bound[which], out.n_iter[which] = objective, gap, n_iter
        out.converged[which] = gap <= tol * objective
    return out


def _solve_fold(models: Models, label_set: torch.Tensor, tol: float) -> tuple[torch.Tensor, ...]:
    """(coef, intercept, objective, gap, n_iter) of the models of one fold."""
    training, k, c = models.training(), len(label_set), models.n_classes
    coef = torch.zeros(models.rows.X.shape[1], k, c, dtype=torch.float64, device=label_set.device)
    intercept, n_iter = coef.new_zeros(k, c), torch.zeros_like(label_set)
    objective, gap = coef.new_zeros(k), coef.new_full((k,), torch.inf)
    strength, last = models.weight.amax(0), {}
    for dtype in (torch.float32, torch.float64):
        left = (~(gap <= tol * objective)).nonzero().ravel()
        if not len(left):
            break
        space = _Space(training.rows.matrix(dtype))
        for value in strength[left].unique():
            group = left[strength[left] == value]
            if dtype == torch.float32:
                for one in group.tolist():
                    before = last.setdefault(int(label_set[one]), one)
                    coef[:, one], intercept[one] = coef[:, before], intercept[before]
                    last[int(label_set[one])] = one
            state = space.state(coef[:, group].flatten(1), len(group))
            state, b, steps = _newton(space, training[group], state, intercept[group].to(dtype), tol)
            coef[:, group], intercept[group] = space.coef(state).unflatten(1, (-1, c)), b.double()
            n_iter[group] += steps
        objective[left], gap[left], intercept[left] = certify_softmax(
            models[left], coef[:, left].flatten(1), intercept[left]
        )
    return coef.flatten(1), intercept, objective, gap, n_iter


def _newton(
    space: _Space, models: Models, state: torch.Tensor, intercept: torch.Tensor, tol: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Newton steps from a state (m, k, c). Returns (state, intercept, (k,) how many)."""
    A, dtype = space.A, space.A.dtype
    weight = models.weight.to(dtype)[..., None]
    scores = (A @ state.flatten(1)).view(-1, *state.shape[1:])
    at = models.fit_intercepts(scores, intercept)
    n_iter = torch.zeros(state.shape[1], dtype=torch.int64, device=A.device)
    before = torch.full_like(at.loss, torch.inf), torch.full_like(at.loss, torch.inf)
    for _ in range(_MAX_NEWTON):
        objective = at.loss + 0.5 * _square(state)
        gradient = state + (A.mT @ at.residual.flatten(1)).view_as(state)
        norm = _square(gradient)
        # A part is kept back: the certificate has other roundings than these scores.
        left = 0.5 * norm > 0.5 * tol * objective
        curvature = _Curvature(at.share, weight, bend(at.share, weight[..., 0]))
        # What neither falls nor flattens has come to the end of this precision.
        stuck = (objective >= before[0] * (1.0 - ROUNDING[dtype])) & (norm >= before[1])
        if not (left & ~stuck).any() or not space.prepare(curvature.mean()):
            break
        before = objective, norm
        # Inexact Newton: loose while far away, quadratic near by (Eisenstat and Walker 1996).
        accuracy = (norm / (2 * objective)).sqrt().clamp(1e-3, 0.1)
        step, along = space.step(gradient, curvature, accuracy)
        fall, length = (gradient * step).sum((0, 2)), left.to(dtype)
        while True:
            moved, there = state + length[:, None] * step, scores + length[:, None] * along
            reached = models.fit_intercepts(there, at.intercept)
            enough = reached.loss + 0.5 * _square(moved) <= (
                objective * (1.0 + ROUNDING[dtype]) + _ARMIJO * length * fall
            )
            if enough.all() or float(length[~enough].min()) < _MIN_STEP:
                break
            length = torch.where(enough, length, 0.5 * length)
        moving = enough & left
        if not moving.any():
            break
        state, scores = torch.where(moving[:, None], moved, state), torch.where(moving[:, None], there, scores)
        at = reached if enough.all() else models.fit_intercepts(scores, at.intercept)
        n_iter += moving
    return state, at.intercept, n_iter
