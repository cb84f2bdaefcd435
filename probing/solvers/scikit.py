"""scikit-learn's newton-cg on each column, under the same certificate: a second opinion, and few fits."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from hiddenlake.probing.certificate import certify
from hiddenlake.probing.solvers.problem import Problem, Solution

# scikit-learn stops on the largest gradient entry, which bounds no gap: tighten until the certificate holds.
_TOLERANCES = (1e-6, 1e-8, 1e-10, 1e-12)
_MAX_ITER = 1000


def solve_scikit(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit each column by LogisticRegression(solver="newton-cg") until its certificate is within tol.

    Copies the rows of each fold, scaled. `converged` is decided by the certificate.
    """
    d, n_columns = problem.rows.shape[1], len(problem.fold)
    coef, intercept, n_iter = np.zeros((d, n_columns)), np.zeros(n_columns), np.zeros(n_columns, int)
    left = np.arange(n_columns)
    for tolerance in _TOLERANCES:
        for column in left:
            inside = problem.weight[:, column] > 0
            rows = problem.rows[inside] * problem.unit[problem.fold[column]]
            model = LogisticRegression(
                C=float(problem.weight[inside, column][0]), solver="newton-cg", tol=tolerance, max_iter=_MAX_ITER
            ).fit(rows, problem.sign[inside, column] > 0)
            coef[:, column], intercept[column] = model.coef_[0], model.intercept_[0]
            n_iter[column] += int(np.max(model.n_iter_))
        certificate = certify(problem, coef, intercept)
        converged = certificate.gap_bound <= tol * certificate.objective
        left = np.flatnonzero(~converged)
        if not len(left):
            break
    return Solution(coef, certificate.intercept, certificate.objective, certificate.gap_bound, n_iter, converged)
