"""Batches: the columns of a problem a part at a time, where all at once would take too much memory."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import torch

from hiddenlake.probing.solvers.problem import Problem, Solution


def solve_in_batches(
    solver: Callable[[Problem, float], Solution], problem: Problem, tol: float, which: np.ndarray, most: int | None
) -> Solution:
    """What the solver finds, with at most so many columns of a fold at once.

    which : (K,) int, what a column is apart from its fold: columns of neighbouring numbers are solved for together.
    most : None for all at once.
    """
    kinds = np.unique(which)
    if most is None or len(kinds) <= most:
        return solver(problem, tol)
    parts, places = [], []
    for start in range(0, len(kinds), most):
        chosen = np.flatnonzero(np.isin(which, kinds[start : start + most]))
        at = torch.as_tensor(chosen, device=problem.X.device)
        some = replace(
            problem, fold=problem.fold[at], label_set=problem.label_set[at], strength=problem.strength[:, at]
        )
        parts.append(solver(some, tol))
        places.append(chosen)
    order = np.argsort(np.concatenate(places))
    return Solution(
        *(np.concatenate([getattr(part, f.name) for part in parts], -1)[..., order] for f in fields(Solution))
    )
