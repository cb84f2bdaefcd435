"""scikit-learn's newton-cg on each column, under the same certificate: a second opinion, and few fits."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from hiddenlake.probing.solvers.certificate import certify
from hiddenlake.probing.solvers.problem import Problem, Solution

# scikit-learn stops on the largest gradient entry, which bounds no gap: tighten until the certificate holds.
_TOLERANCES = (1e-6, 1e-8, 1e-10, 1e-12)
_MAX_ITER = 1000


def solve_scikit(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit each column by LogisticRegression(solver="newton-cg") until its certificate is within tol.

    Copies the rows of each fold, scaled. `converged` is decided by the certificate.
    """
    d, n_columns = problem.X.shape[1], len(problem.fold)
    coef, intercept, n_iter = np.zeros((d, n_columns)), np.zeros(n_columns), np.zeros(n_columns, int)
    left = np.arange(n_columns)
    for tolerance in _TOLERANCES:
        for fold, chosen in problem.by_fold():
            chosen = chosen.cpu().numpy()
            chosen = chosen[np.isin(chosen, left)]
            if not len(chosen):
                continue
            columns = problem.columns(fold, torch.as_tensor(chosen)).training()
            rows, weight = columns.rows.matrix(torch.float64).cpu().numpy(), columns.weight.cpu().numpy()
            for i, column in enumerate(chosen):
                positive = columns.positive[:, i].cpu().numpy()
                strength = columns.strength[:, i].cpu().numpy()
                model = LogisticRegression(solver="newton-cg", C=1.0, tol=tolerance, max_iter=_MAX_ITER)
                model.fit(rows, positive, sample_weight=weight * strength[positive.astype(int)])
                coef[:, column], intercept[column] = model.coef_[0], model.intercept_[0]
                n_iter[column] += int(np.max(model.n_iter_))
        found = certify(problem, coef, intercept)
        objective, gap, intercept = (x.cpu().numpy() for x in (found.objective, found.gap_bound, found.intercept))
        converged = gap <= tol * objective
        left = np.flatnonzero(~converged)
        if not len(left):
            break
    return Solution(coef, intercept, objective, gap, n_iter, converged)
