"""Spaces: where Newton's steps are solved for, with the weights as coordinates or one coordinate a row.

For a curvature D of the losses, one value a row and column, a step s of the weights solves (I + A^T D A) s = -g.
Were D the same in all columns, say E, one matrix H = I + A^T E A would be inverted for all. So the step is sought in
coordinates u in which H is the identity: w = T u with T T^T = H^-1, and F = A T, so that

    (I + F^T (D - E) F) u = -T^T g

is well conditioned as far as D is near E, however badly A is: what rounding does to F is small beside F, and not
beside what was left of A's largest directions. Conjugate gradients solve it for all columns at once. E is the mean of the
columns' D when H is factorised, which is done again once as much was spent on products as that costs.

With fewer rows than features E is one number c, and all is expressed in rows: w = A^T a and g = A^T v have
T^T g = F^T v, and only K = F F^T = A A^T (I + c A A^T)^-1 is needed: u = F^T n turns the step into n + (D - c) K n = -v, in the inner product
of K, and then a += n - c K n and the scores change by K n.

Shape letters: n rows, d features, k columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from hiddenlake.probing.solvers.problem import ScaledRows

# In rows a factorisation serves all columns whose curvature is, in its mean, within this factor of what it was made for:
# conjugate gradients lose its root in steps, while another factorisation costs as much as tens of them. It is made for
# more than what is asked, because a path's C grows. (Measured over 1,000 fits at 4 to 32, ahead by 1 to 8.)
_REACH = 16.0
_AHEAD = 4.0

# A product of fewer columns waits for memory, and takes so many times as long for what it computes (measured on a CPU).
_FEW = 8
_VECTOR_COST = 6.0

# Products a column needs without a factorisation where the penalty is not weak.
_USUAL_STEPS = 25

# Below this c times the largest eigenvalue of A A^T there is nothing to precondition.
_PLAIN = 10.0

_MAX_STEPS = 200


class BreakdownError(ArithmeticError):
    """A space's precision is too low for its rows."""


@dataclass(frozen=True, slots=True)
class Step:
    """state : how the state changes.  scores : how the scores do, (n, k)."""

    state: torch.Tensor
    scores: torch.Tensor


def make_spaces(A: torch.Tensor, k: int) -> "Iterator[Primal | Dual]":
    """Spaces in which to solve for k columns: the next one where one has given up.

    A : (n, d), the training rows of one fold, float32 or float64.

    Few columns may be done before a factorisation has paid for itself, so they are first tried without.
    """
    price = _price(*A.shape, k)
    few = k * _USUAL_STEPS <= price
    if few or A.shape[1] <= A.shape[0]:
        yield Primal(A, price, patient=few)
    if A.shape[1] > A.shape[0]:
        yield Dual(A)


def make_space(A: torch.Tensor, k: int) -> "Primal | Dual":
    """The smaller of both, for k columns."""
    return Primal(A, _price(*A.shape, k)) if A.shape[1] <= A.shape[0] else Dual(A)


def _price(n: int, d: int, k: int) -> int:
    """Products of a column with A and A^T that cost as much as a factorisation."""
    small = min(n, d)
    products = (3 * n * d * small + small**3 / 3) / (4 * n * d)
    return int(products / _VECTOR_COST if k < _FEW else products)


@dataclass(frozen=True, slots=True)
class Curvature:
    """D of some columns at their best intercept: D - D 1 1^T D / 1^T D 1.

    values : (n, k).  inverse : (k,), of their sums.
    """

    values: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Self:
        total = values.sum(0)
        return cls(values, torch.where(total > 0, 1.0 / total, 0.0))

    def __getitem__(self, chosen: torch.Tensor) -> Self:
        """Of some of the columns."""
        return type(self)(self.values[:, chosen].contiguous(), self.inverse[chosen])

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """(n, k) change of the residual for a change of the scores."""
        out = self.values * scores
        return out.addcmul_(self.values, out.sum(0) * self.inverse, value=-1.0)


class Primal:
    """A state is the weights, (d, k).

    price : products of a column with A and A^T that cost as much as a factorisation.
    patient : spend as much before the first one.
    """

    def __init__(self, A: torch.Tensor, price: int, patient: bool = False) -> None:
        self.A = A
        # Many columns of several C go on using a factorisation that few would replace (measured at once and twice).
        self._price, self._spent = (price, 0) if patient else (2 * price, 2 * price)
        self._L: torch.Tensor | None = None
        self._E, self._F = A.new_zeros(1, 1), A

    def start(self, k: int) -> torch.Tensor:
        return self.A.new_zeros(self.A.shape[1], k, dtype=torch.float64)

    def coef(self, state: torch.Tensor, rows: ScaledRows) -> torch.Tensor:
        """(d, k) float64 weights. rows : those that A was made of, as they are stored."""
        return state

    def scores(self, state: torch.Tensor) -> torch.Tensor:
        return (self.A @ state.to(self.A.dtype)).double()

    def square(self, state: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(k,) ||w||^2."""
        return state.square().sum(0)

    def gradient(self, state: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(g, ||g||^2)."""
        g = torch.addmm(state.to(self.A.dtype), self.A.mT, residual)
        return g, g.square().sum(0)

    def solve(
        self, g: torch.Tensor, curvature: Curvature, c: float, accuracy: torch.Tensor
    ) -> tuple[Step, torch.Tensor]:
        """(step, (k,) derivative of the objective along it).

        c : the columns' mean curvature, which only Dual needs.
        accuracy : (k,), of the residual in these coordinates, relative to the right-hand side.

        Raises BreakdownError.
        """
        self._prepare(curvature)
        if self._L is None:
            state, scores = self._cg(g, curvature, accuracy)
            return Step(state.double(), scores.double()), (g * state).sum(0).double()
        g = torch.linalg.solve_triangular(self._L, g, upper=False)
        u, Fu = self._cg(g, curvature, accuracy)
        state = torch.linalg.solve_triangular(self._L.mT, u, upper=True)
        return Step(state.double(), Fu.double()), (g * u).sum(0).double()

    def _prepare(self, curvature: Curvature) -> None:
        if self._spent < self._price:
            return
        if self.A.shape[1] > self.A.shape[0]:
            raise BreakdownError("with fewer rows than features, rows are what is factorised")
        self._E, self._spent = curvature.values.mean(1, keepdim=True), 0
        B = self._E.sqrt() * self.A
        H = (B.mT @ B).double()
        H.diagonal().add_(1.0)
        self._L = _cholesky(H).to(self.A.dtype)
        self._F = torch.linalg.solve_triangular(self._L, self.A.mT, upper=False).mT.contiguous()

    def _cg(self, g: torch.Tensor, curvature: Curvature, accuracy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F, E = self._F, self._E
        out, out_scores = torch.zeros_like(g), torch.zeros_like(curvature.values)
        on = torch.arange(g.shape[1], device=g.device)
        u, Fu = out.clone(), out_scores.clone()
        rest = -g
        direction, norm = rest.clone(), rest.square().sum(0)
        goal = accuracy.square() * norm
        for _ in range(_MAX_STEPS):
            if self._L is None and self._spent >= self._price:
                break
            self._spent += len(on)
            forward = F @ direction
            product = torch.addmm(direction, F.mT, curvature(forward).addcmul_(E, forward, value=-1.0))
            bend = (direction * product).sum(0)
            going = (norm > goal) & (bend > 0)
            if not going.any():
                break
            if going.sum() < _SHRINK * len(on):
                out[:, on], out_scores[:, on] = u, Fu
                on, u, Fu, rest, direction = on[going], *(x[:, going].contiguous() for x in (u, Fu, rest, direction))
                forward, product, curvature = forward[:, going], product[:, going], curvature[going]
                norm, goal, bend, going = norm[going], goal[going], bend[going], going[going]
            length = torch.where(going, norm / bend, 0.0)
            u.addcmul_(direction, length)
            Fu.addcmul_(forward, length)
            rest.addcmul_(product, length, value=-1.0)
            renewed = rest.square().sum(0)
            direction = torch.addcmul(rest, direction, torch.where(going, renewed / norm, 0.0))
            norm = torch.where(going, renewed, norm)
        out[:, on], out_scores[:, on] = u, Fu
        return out, out_scores


class Dual:
    """A state is the rows' coefficients, (n, k)."""

    def __init__(self, A: torch.Tensor) -> None:
        self.A = A
        self._gram = A @ A.mT
        self._largest = _largest(self._gram)
        self._c = self._K = None

    def start(self, k: int) -> torch.Tensor:
        return self.A.new_zeros(self.A.shape[0], k, dtype=torch.float64)

    def coef(self, state: torch.Tensor, rows: ScaledRows) -> torch.Tensor:
        return rows.pull(state)

    def scores(self, state: torch.Tensor) -> torch.Tensor:
        return (self._gram @ state.to(self.A.dtype)).double()

    def square(self, state: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (state * scores).sum(0)

    def gradient(self, state: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(v, ||g||^2)."""
        v = state.to(self.A.dtype) + residual
        return v, (v * (self._gram @ v)).sum(0)

    def solve(
        self, v: torch.Tensor, curvature: Curvature, c: float, accuracy: torch.Tensor
    ) -> tuple[Step, torch.Tensor]:
        self._prepare(c)
        n, Kn = self._cg(v, curvature, accuracy)
        return Step(n.double().sub_(Kn, alpha=self._c), Kn.double()), (v * Kn).sum(0).double()

    def _prepare(self, c: float) -> None:
        if c * self._largest <= _PLAIN:
            self._c, self._K = 0.0, self._gram
            return
        if self._c and 1 / _REACH <= c / self._c <= _REACH:
            return
        c *= _AHEAD
        H = c * self._gram.double()
        H.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(_cholesky(H))
        inverse.diagonal().sub_(1.0)
        self._K, self._c = (inverse / -c).to(self.A.dtype), c

    def _cg(self, v: torch.Tensor, curvature: Curvature, accuracy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        K, c = self._K, self._c
        out, out_scores = torch.zeros_like(v), torch.zeros_like(v)
        on = torch.arange(v.shape[1], device=v.device)
        n, Kn = out.clone(), out.clone()
        rest = -v
        Krest = K @ rest
        direction, Kdirection, norm = rest.clone(), Krest.clone(), (rest * Krest).sum(0)
        goal = accuracy.square() * norm
        for _ in range(_MAX_STEPS):
            product = (curvature(Kdirection) + direction).sub_(Kdirection, alpha=c)
            bend = (Kdirection * product).sum(0)
            going = (norm > goal) & (bend > 0)
            if not going.any():
                break
            if going.sum() < _SHRINK * len(on):
                out[:, on], out_scores[:, on] = n, Kn
                every = (n, Kn, rest, direction, Kdirection, product)
                on, (n, Kn, rest, direction, Kdirection, product) = on[going], (x[:, going].contiguous() for x in every)
                curvature, norm, goal, bend, going = (
                    curvature[going],
                    norm[going],
                    goal[going],
                    bend[going],
                    going[going],
                )
            length = torch.where(going, norm / bend, 0.0)
            n.addcmul_(direction, length)
            Kn.addcmul_(Kdirection, length)
            rest.addcmul_(product, length, value=-1.0)
            Krest = K @ rest
            renewed = (rest * Krest).sum(0)
            more = torch.where(going, renewed / norm, 0.0)
            direction = torch.addcmul(rest, direction, more)
            Kdirection = torch.addcmul(Krest, Kdirection, more)
            norm = torch.where(going, renewed, norm)
        out[:, on], out_scores[:, on] = n, Kn
        return out, out_scores


# Columns that are done are taken out once so few are left: that copies the others.
_SHRINK = 0.7


def _cholesky(H: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info):
        # What rounding did to A A^T is more than what the penalty adds to it.
        raise BreakdownError(f"I + c A^T A of {len(H)} rows is not positive definite in this precision")
    return factor


def _largest(gram: torch.Tensor) -> float:
    """An estimate of the largest eigenvalue, from below, by eight steps of power iteration."""
    x = gram.sum(1, keepdim=True)
    for _ in range(8):
        x = gram @ (x / x.norm().clamp_min(1e-30))
    return float(x.norm())
