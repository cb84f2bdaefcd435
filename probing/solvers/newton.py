"""Newton: all columns of a fold at once, along the path of growing C, and the certificate that it holds.

The intercept is eliminated: every value of the objective is at its best intercept, so that the Hessian is a Schur
complement and the gradient is the certificate's (hiddenlake.probing.solvers.certificate).

Steps are solved for in float32. What is true is decided in float64, from the rows as they were stored. A column whose
certificate does not hold goes on from its exact scores, first in float32 again, which is what iterative refinement is,
then in float64, then by itself with the exact Hessian; and what is left says that it has not converged.
"""

import numpy as np
import torch

from hiddenlake.kernels.logistic import Losses
from hiddenlake.probing.solvers.certificate import Fitted, Intercepts, certify_columns
from hiddenlake.probing.solvers.problem import Columns, Problem, Solution
from hiddenlake.probing.solvers.spaces import BreakdownError, Curvature, Dual, Primal, Step, make_space, make_spaces

_MAX_NEWTON = 30
_MAX_EXACT = 200
_ARMIJO = 1e-4
_MIN_STEP = 2.0**-30

# Where a step changes an objective by less than this, relatively, the change is lost in rounding and the step is trusted.
_ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}

# Precision of the steps, one after the other.
_LADDER = (torch.float32, torch.float32, torch.float64)


def solve_newton(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit all columns until gap_bound <= tol * objective.

    `converged` is decided by the certificate, computed afresh from the rows.
    """
    d, n_columns = problem.X.shape[1], len(problem.fold)
    out = Solution(
        np.zeros((d, n_columns)), *(np.zeros(n_columns) for _ in range(3)), np.zeros(n_columns, int),
        np.zeros(n_columns, bool),
    )  # fmt: skip
    for fold, chosen in problem.by_fold():
        found = _Fold(problem.columns(fold, chosen), problem.label_set[chosen], tol).solve()
        for name in ("coef", "intercept", "objective", "gap_bound", "n_iter", "converged"):
            getattr(out, name)[..., chosen.cpu().numpy()] = getattr(found, name)
    return out


class _Fold:
    """The columns of one fold. label_set : (k,), of each column."""

    def __init__(self, columns: Columns, label_set: torch.Tensor, tol: float) -> None:
        self.columns, self.training, self.tol = columns, columns.training(), tol
        self.label_set = label_set
        self.n_iter = torch.zeros(len(label_set), dtype=torch.int64, device=label_set.device)

    def solve(self) -> Solution:
        columns, training = self.columns, self.training
        for space in make_spaces(training.rows.matrix(torch.float32), len(self.label_set)):
            state, intercept = self._path(space)
            coef = space.coef(state, training.rows)
            found = certify_columns(columns, coef, intercept)
            objective, gap, intercept = found.objective, found.gap_bound, found.intercept
            scores = found.scores
            left = (~(gap <= self.tol * objective)).nonzero().ravel()
            if not len(left):
                break
        for dtype in _LADDER[1:]:
            if not len(left):
                break
            if dtype != space.A.dtype:
                space = make_space(training.rows.matrix(dtype), len(left))
            inside = columns.weight > 0
            for group in self._groups(left):
                moved, b = self._newton(space, group, state[:, group], scores[inside][:, group], intercept[group])
                state[:, group], intercept[group] = moved, b
            coef[:, left] = space.coef(state[:, left], training.rows)
            found = certify_columns(columns[left], coef[:, left], intercept[left])
            objective[left], gap[left], intercept[left] = found.objective, found.gap_bound, found.intercept
            scores[:, left] = found.scores
            left = (~(gap <= self.tol * objective)).nonzero().ravel()
        for column in left.tolist():
            self._exact(column, coef, intercept, objective, gap)
        return Solution(
            *(x.cpu().numpy() for x in (coef, intercept, objective, gap, self.n_iter, gap <= self.tol * objective))
        )

    def _groups(self, chosen: torch.Tensor) -> list[torch.Tensor]:
        """Columns of one strength together, the weakest first."""
        strength = self.columns.strength[:, chosen].amax(0)
        return [chosen[strength == value] for value in strength.unique()]

    def _path(self, space: Primal | Dual) -> tuple[torch.Tensor, torch.Tensor]:
        """Each C begins where the one before ended, of the same labels."""
        k, device = len(self.label_set), self.label_set.device
        n_sets = int(self.label_set.max()) + 1
        state, b = space.start(k), torch.zeros(k, dtype=torch.float64, device=device)
        last = torch.full((n_sets,), -1, device=device)
        for group in self._groups(torch.arange(k, device=device)):
            sets = self.label_set[group]
            before = last[sets]
            known = before >= 0
            first = torch.where(known, state[:, before.clamp_min(0)], 0.0)
            start = torch.where(known, b[before.clamp_min(0)], 0.0)
            state[:, group], b[group] = self._newton(space, group, first, space.scores(first), start)
            last[sets] = group
        return state, b

    def _newton(
        self, space: Primal | Dual, group: torch.Tensor, state: torch.Tensor, scores: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Newton steps from a state whose scores are known. Returns state and intercept."""
        dtype, tol = space.A.dtype, self.tol
        out, out_b = state.clone(), b.clone()
        on = torch.arange(len(group), device=group.device)
        intercepts = Intercepts.of(self.training[group], dtype)
        fitted = intercepts.fit(scores.to(dtype), b.to(dtype))
        square = space.square(state, scores)
        for _ in range(_MAX_NEWTON):
            objective = fitted.at.loss + 0.5 * square
            g, norm = space.gradient(state, fitted.at.residual)
            # A part is kept back: the certificate has other roundings than these scores.
            left = 0.5 * norm > 0.5 * tol * objective
            out[:, on], out_b[on] = state, fitted.intercept.double()
            if not left.any():
                break
            if not left.all():
                on, state, scores, square, g = (
                    on[left],
                    state[:, left],
                    scores[:, left],
                    square[left],
                    g[:, left].contiguous(),
                )
                objective, norm, intercepts = objective[left], norm[left], intercepts[left]
                fitted = Fitted(fitted.intercept[left], Losses(*(x[..., left].contiguous() for x in fitted.at)))
            curvature = fitted.at.curvature
            c = float(curvature.mean(0).clamp_min(1e-30).log().mean().exp())
            # The forcing term of an inexact Newton step: loose while far away, quadratic near by
            # (Eisenstat and Walker 1996).
            accuracy = (norm / (2 * objective)).sqrt().to(dtype).clamp(1e-3, 0.1)
            try:
                step, slope = space.solve(g, Curvature.of(curvature), c, accuracy)
            except BreakdownError:
                break
            state, scores, square, fitted, moved = self._search(
                space, intercepts, state, scores, objective, fitted, step, slope
            )
            self.n_iter[group[on]] += 1
            if not moved.any():
                break
        out[:, on], out_b[on] = state, fitted.intercept.double()
        return out, out_b

    def _search(
        self,
        space: Primal | Dual,
        intercepts: Intercepts,
        state: torch.Tensor,
        scores: torch.Tensor,
        objective: torch.Tensor,
        fitted: Fitted,
        step: Step,
        slope: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Fitted, torch.Tensor]:
        """Halve each column's step until its objective falls enough (Armijo).

        slope : (k,) derivative along the step. Returns where each column has gone, and (k,) whether it has.
        """
        length = torch.ones_like(objective)
        # Where the intercept goes, to first order: a start from which few steps are left.
        towards = (fitted.at.curvature * step.scores).sum(0) / fitted.at.curve.clamp_min(1e-30)
        while True:
            moved_state = state + length * step.state
            moved_scores = scores + length * step.scores
            square = space.square(moved_state, moved_scores)
            start = fitted.intercept - (length * towards).to(space.A.dtype)
            moved = intercepts.fit(moved_scores.to(space.A.dtype), start)
            reached = moved.at.loss + 0.5 * square
            enough = reached <= objective * (1.0 + _ROUNDING[space.A.dtype]) + _ARMIJO * length * slope
            if enough.all() or float(length.min()) < _MIN_STEP:
                break
            length = torch.where(enough, length, 0.5 * length)
        if not enough.all():
            # A column without progress stays where it is.
            moved_state, moved_scores = (
                torch.where(enough, moved_state, state),
                torch.where(enough, moved_scores, scores),
            )
            square = space.square(moved_state, moved_scores)
            moved = intercepts.fit(moved_scores.to(space.A.dtype), fitted.intercept)
        return moved_state, moved_scores, square, moved, enough

    def _exact(
        self,
        column: int,
        coef: torch.Tensor,
        intercept: torch.Tensor,
        objective: torch.Tensor,
        gap: torch.Tensor,
    ) -> None:
        """Newton with the exact Hessian, in float64, on what nothing else has finished."""
        one = torch.tensor([column], device=coef.device)
        training = self.training[one]
        A = training.rows.matrix(torch.float64)
        intercepts = Intercepts.of(training, torch.float64)
        w = coef[:, one]
        scores = A @ w
        fitted = intercepts.fit(scores, intercept[one])
        for _ in range(_MAX_EXACT):
            at = fitted.at.loss + 0.5 * w.square().sum(0)
            g = torch.addmm(w, A.mT, fitted.at.residual)
            if float(0.5 * g.square().sum()) <= 0.5 * self.tol * float(at):
                break
            # H = I + A^T (D - D D^T / sum D) A = I + B^T B with B = (I - q q^T) sqrt(D) A, q = sqrt(D) / ||sqrt(D)||
            root = fitted.at.curvature.sqrt()
            B = root * A
            if float(length := root.norm()) > 0:
                q = root / length
                B = B - q @ (q.mT @ B)
            step = -_ridge(B, g)
            step_scores, slope, length = A @ step, float((g * step).sum()), 1.0
            while length >= _MIN_STEP:
                moved = w + length * step
                there = intercepts.fit(scores + length * step_scores, fitted.intercept)
                reached = float(there.at.loss + 0.5 * moved.square().sum(0))
                if reached <= float(at) * (1.0 + _ROUNDING[torch.float64]) + _ARMIJO * length * slope:
                    break
                length *= 0.5
            else:
                break
            w, scores, fitted = moved, scores + length * step_scores, there
            self.n_iter[column] += 1
        found = certify_columns(self.columns[one], w, fitted.intercept)
        if float(found.gap_bound) < float(gap[column]):
            coef[:, one], intercept[one] = w, found.intercept
            objective[one], gap[one] = found.objective, found.gap_bound


def _ridge(B: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """(I + B^T B)^-1 r, from the smaller of both Cholesky factorisations (Woodbury)."""
    m, d = B.shape
    if d <= m:
        H = B.mT @ B
        H.diagonal().add_(1.0)
        return torch.cholesky_solve(r, torch.linalg.cholesky(H))
    H = B @ B.mT
    H.diagonal().add_(1.0)
    return r - B.mT @ torch.cholesky_solve(B @ r, torch.linalg.cholesky(H))
