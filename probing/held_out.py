"""Held out: one cell's score of every sample, by the probe that did not see it."""

from typing import Any

import numpy as np
import xarray as xr
from scipy.special import expit

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.design import make_design
from hiddenlake.probing.judge import judge
from hiddenlake.probing.selection import select
from hiddenlake.probing.solve import solve_cell, too_few
from hiddenlake.probing.sweep import sweep
from hiddenlake.probing.weights import ClassWeight


def held_out(
    capture: Any,
    site: str,
    layer: int,
    position: str,
    *,
    label: str = "correct",
    groups: str | None = "group",
    C: float = 0.01,
    cv: int = 5,
    class_weight: ClassWeight = None,
    penalty: str = "l2",
    l1_ratio: float | None = None,
    scale: str = "feature",
    solver: str = "auto",
    tol: float = 1e-6,
    seed: int = 0,
) -> xr.Dataset:
    """Cross-validate the probe of one cell, and keep what it says of each sample.

    The arguments are those of fit_grid, and so are the samples and the folds. In a grid of this C alone and without
    shuffles the AUCs are these to the bit; beside other columns, sums are rounded otherwise, and they agree to within
    the certificates.

    Returns a Dataset over all samples of the capture, in its order: score, log-odds of the positive class by the probe of
    the other folds (scores of two folds are those of two probes), probability, and fold, which are NaN and -1 where the
    cell does not have the sample; and positive, whether it is of the positive class (attrs["positive_class"]), which
    means nothing where `labelled` is False. Over (fold_number): fold_auc, fold_objective and fold_gap_bound, and the probes
    themselves, intercept and coef (fold_number, hidden), float64, in the coordinates of the stored activations:
    x . coef + intercept is a score.

    Raises ProbeError, also when the cell cannot be fitted, and UnknownNameError.
    """
    chosen = select(capture, site, label=label, groups=groups, layers=[layer], positions=[str(position)])
    design = make_design(
        chosen.positive, kept=chosen.labelled, names=chosen.index, groups=chosen.groups, C=C, cv=cv, scale=scale,
        solver=solver, tol=tol, shuffles=0, seed=seed, class_weight=class_weight,
        penalty=penalty, l1_ratio=l1_ratio,
    )  # fmt: skip
    if len(design.C) != 1:
        raise ProbeError(f"C is {design.C.tolist()}: the scores are those of one probe, name one number")

    def fit(X: np.ndarray, rows: np.ndarray, _: int) -> xr.Dataset:
        if reason := too_few(design.labels[0, rows], design.fold[rows], cv):
            raise ProbeError(f"layer {layer}, {position}: {reason}")
        solved = solve_cell(X, rows, design)
        judged = judge(solved, X)
        score, fold = np.full(len(chosen.positive), np.nan), np.full(len(chosen.positive), -1)
        score[rows], fold[rows] = judged.score[:, 0], solved.fold
        per_fold = {
            "fold_auc": judged.auc,
            "fold_objective": solved.solution.objective,
            "fold_gap_bound": solved.solution.gap_bound,
        }
        # z = ((x - centre) unit) . w + b, as coefficients of the stored x
        problem = solved.problem
        coef = solved.solution.coef.T * problem.unit[solved.mask].cpu().numpy()
        intercept = solved.solution.intercept - coef @ problem.centre.cpu().numpy()
        return xr.Dataset(
            {
                "coef": (("fold_number", "hidden"), coef),
                "intercept": ("fold_number", intercept),
                "score": ("sample", score),
                "probability": ("sample", expit(score)),
                "fold": ("sample", fold),
                "positive": ("sample", chosen.positive),
                "labelled": ("sample", chosen.labelled),
            }
            | {name: ("fold_number", solved.spread(values)[0, :, 0]) for name, values in per_fold.items()},
            {"sample": chosen.data.sample.values, "fold_number": np.arange(cv)},
        )

    found = sweep(Cells(chosen.data[chosen.site]), chosen.mask, chosen.labelled, fit, order=design.order)[0, 0]
    found.attrs = {
        "site": chosen.site,
        "layer": int(layer),
        "position": str(position),
        "label": label,
        "positive_class": chosen.positive_class,
        "groups": groups or "question",
        "n_groups": len(set(chosen.groups[chosen.labelled].tolist())),
        "C": float(design.C[0]),
        "cv": cv,
        "class_weight": str(class_weight or "none"),
        "l1_ratio": design.l1_ratio,
        "scale": scale,
        "solver": design.solver_name,
        "tol": tol,
        "seed": seed,
        "auc": float(found.fold_auc.mean()),
        "converged": bool((found.fold_gap_bound <= tol * found.fold_objective).all()),
        "capture": chosen.path,
        "identity": chosen.digest,
    }
    return found
