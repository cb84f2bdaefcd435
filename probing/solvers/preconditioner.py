"""Preconditioner: inverses of I + c A^T A, A being all rows of the cell in the mean scale of its folds.

This is about the Hessian of a logistic loss with one curvature for every row. It is the same for
every fold and label set, and for every C whose c lies near: one factorisation serves them all. A
factorisation of its own for each fold saves a sixth of the products with the rows, and costs two to
three times the whole solve (measured at 1000 rows x 576 features, 5 folds x 2 label sets).
"""

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpotri

from hiddenlake.probing.solvers.problem import Problem

# A column takes an inverse whose c is within this factor of its own: CG loses at most as much in
# conditioning, while a factorisation costs as much as some 20 steps of CG.
_REACH = 4.0


def ridge_solver(A: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function r -> (I + A^T A)^-1 r, for A (m, d) float64 and r (d, k), from one Cholesky.

    Of the d x d matrix, or where there are fewer rows than features of the m x m one (Woodbury).
    """
    m, d = A.shape
    if d <= m:
        factor = cho_factor(_plus_diagonal(A.T @ A, 1.0), lower=True, overwrite_a=True, check_finite=False)
        return lambda r: cho_solve(factor, r, check_finite=False)
    factor = cho_factor(_plus_diagonal(A @ A.T, 1.0), lower=True, overwrite_a=True, check_finite=False)
    return lambda r: r - A.T @ cho_solve(factor, A @ r, check_finite=False)


class Preconditioner:
    """Inverses for the columns of one problem, built when first needed."""

    def __init__(self, problem: Problem) -> None:
        self._rows = problem.rows
        self._unit = problem.unit.mean(axis=0)
        n, d = problem.rows.shape
        self._dual = n < d
        self._gram: np.ndarray | None = None
        self._inverses: list[tuple[float, np.ndarray]] = []

    def apply(self, residual: np.ndarray, c: np.ndarray) -> np.ndarray:
        """(d, k) residuals times the inverse nearest to each column's c.

        c : (k,), the sum of a column's curvatures over the number of all rows.
        """
        chosen: dict[int, list[int]] = {}
        for column, wanted in enumerate(c.tolist()):
            chosen.setdefault(self._nearest(max(wanted, 1e-300)), []).append(column)
        out = np.empty_like(residual)
        for which, columns in chosen.items():
            out[:, columns] = self._multiply(self._inverses[which][1], residual[:, columns])
        return out

    def _nearest(self, wanted: float) -> int:
        distances = [abs(np.log(c / wanted)) for c, _ in self._inverses]
        if not distances or min(distances) > np.log(_REACH):
            self._inverses.append((wanted, self._inverse(wanted)))
            return len(self._inverses) - 1
        return int(np.argmin(distances))

    def _multiply(self, inverse: np.ndarray, residual: np.ndarray) -> np.ndarray:
        if not self._dual:
            return inverse @ residual
        # (I + c A^T A)^-1 = I - A^T (I / c + A A^T)^-1 A, by Woodbury
        unit = self._unit[:, None]
        return residual - unit * (self._rows.T @ (inverse @ (self._rows @ (unit * residual))))

    def _inverse(self, c: float) -> np.ndarray:
        if self._gram is None:
            if self._dual:
                A = self._rows * self._unit
                self._gram = A @ A.T
            else:
                self._gram = (self._rows.T @ self._rows) * np.outer(self._unit, self._unit)
        matrix = _plus_diagonal(self._gram.copy(), 1.0 / c) if self._dual else _plus_diagonal(c * self._gram, 1.0)
        # Transposed, a symmetric matrix in C order is what LAPACK wants without a copy.
        factor, _ = cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
        inverse, info = dpotri(factor, lower=True, overwrite_c=True)
        if info != 0:
            raise np.linalg.LinAlgError(f"no inverse of a {matrix.shape} matrix (dpotri: {info})")
        return np.tril(inverse) + np.tril(inverse, -1).T


def _plus_diagonal(matrix: np.ndarray, value: float) -> np.ndarray:
    matrix.flat[:: len(matrix) + 1] += value
    return matrix
