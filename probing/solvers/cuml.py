"""cuML's QN on each column, several at a time, on CuPy arrays of the rows: a second opinion from a GPU, and L1 there.

L-BFGS, or OWL-QN where the penalty has an l1 part, in float32 only, which is all that the certificate may leave unfinished.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.probing.solvers.certificate import certify
from hiddenlake.probing.solvers.problem import Columns, Problem, Solution

# Of the gradient of the mean loss, which bounds no gap: tighten until the certificate holds, or float32 ends.
_TOLERANCES = (1e-6, 1e-8)
_MAX_ITER = 5000
# Fits wait for the GPU, and the GPU for the host, many times an iteration; each thread has a handle and a stream of its own.
_THREADS = 4


def solve_cuml(problem: Problem, tol: float = 1e-6) -> Solution:
    """Fit each column by cuML's QN, along the path of growing C, until its certificate is within tol.

    Copies the training rows of each fold to the GPU, scaled, in float32. `converged` is decided by the certificate, in float64.

    Raises HiddenlakeError without cuML, or without a GPU.
    """
    QN, to_array = _load()
    d, n_columns = problem.X.shape[1], len(problem.fold)
    coef, intercept, n_iter = np.zeros((d, n_columns)), np.zeros(n_columns), np.zeros(n_columns, int)
    left = np.ones(n_columns, bool)
    for tolerance in _TOLERANCES:
        for fold, chosen in problem.by_fold():
            chosen = chosen[torch.as_tensor(left, device=chosen.device)[chosen]]
            if not len(chosen):
                continue
            training, label_set = problem.columns(fold, chosen).training(), problem.label_set[chosen]
            rows = to_array(training.rows.matrix(torch.float32))
            chains = [(label_set == one).nonzero().ravel() for one in label_set.unique()]

            def fit(
                chain: torch.Tensor, training: Columns = training, rows: Any = rows, tolerance: float = tolerance
            ) -> list[tuple[np.ndarray, float, int]]:
                return _chain(QN, rows, to_array, training[chain], tolerance)

            with ThreadPoolExecutor(_THREADS) as pool:
                for chain, found in zip(chains, pool.map(fit, chains), strict=True):
                    for column, (w, b, steps) in zip(chosen[chain].tolist(), found, strict=True):
                        coef[:, column], intercept[column] = w, b
                        n_iter[column] += steps
        found = certify(problem, coef, intercept)
        objective, gap, intercept = (x.cpu().numpy() for x in (found.objective, found.gap_bound, found.intercept))
        left = ~(gap <= tol * objective)
        if not left.any():
            break
    return Solution(coef, intercept, objective, gap, n_iter, ~left)


def _load() -> tuple[type, Callable[[torch.Tensor], Any]]:
    """(cuml.solvers.QN, what makes a CuPy array of a tensor, without a copy where it is on the GPU)."""
    try:
        import cupy
        from cuml.solvers import QN
    except ImportError as error:
        raise HiddenlakeError(
            f"solver='cuml' needs cuML and CuPy ({error}): pip install 'hiddenlake[cuml]', or use solver='auto'"
        ) from error
    if not (torch.cuda.is_available() and cupy.cuda.is_available()):
        raise HiddenlakeError(
            "solver='cuml' needs a CUDA GPU that torch and CuPy can use: use solver='auto' without one"
        )

    def to_array(tensor: torch.Tensor) -> Any:
        tensor = tensor.cuda().contiguous()
        torch.cuda.synchronize()  # cuML reads it on streams of its own
        return cupy.from_dlpack(tensor)

    return QN, to_array


def _chain(
    QN: type, rows: Any, to_array: Callable[[torch.Tensor], Any], columns: Columns, tolerance: float
) -> list[tuple[np.ndarray, float, int]]:
    """(w, b, iterations) of each column of one label set, each C from where the one before ended.

    QN divides the losses by the number of rows, or by what they weigh: weights whose mean is 1 make both the same, and the
    penalties are divided by what the weights are divided by.
    """
    found: dict[int, tuple[np.ndarray, float, int]] = {}
    model = QN(
        loss="sigmoid", fit_intercept=True, max_iter=_MAX_ITER, tol=tolerance, delta=0.0, warm_start=True,
        penalty_normalized=False, output_type="numpy",
    )  # fmt: skip
    weights = columns.weights()
    for k in columns.strength.amax(0).argsort().tolist():
        total = float(weights[:, k].sum())
        model.l1_strength, model.l2_strength = columns.l1_ratio / total, (1.0 - columns.l1_ratio) / total
        model.fit(
            rows, to_array(columns.positive[:, k].float()),
            sample_weight=to_array((weights[:, k] * (len(weights) / total)).float()),
        )  # fmt: skip
        # The number of iterations has had both names.
        steps = model.n_iter_ if hasattr(model, "n_iter_") else model.num_iters
        w, b = (np.asarray(x, np.float64).ravel() for x in (model.coef_, model.intercept_))
        found[k] = w, float(b[0]), int(np.max(steps))
    return [found[k] for k in range(len(found))]
