"""Train: one probe to be kept, fitted on all samples of one cell, with what its cross-validation says of it."""

from typing import Any

import numpy as np

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.design import solver_of
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.probe import Probe
from hiddenlake.probing.selection import select
from hiddenlake.probing.solvers.penalty import check_penalty
from hiddenlake.probing.solvers.problem import make_problem
from hiddenlake.probing.weights import ClassWeight, column_class_weights


def fit_probe(
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
) -> Probe:
    """Fit the probe of one cell on all of its samples.

    The arguments are those of fit_grid, and so are the samples. What `fit` holds of the probe's AUC is that of the
    cross-validated probes, each of which saw fewer samples.

    Raises ProbeError, UnknownNameError.
    """
    chosen = select(capture, site, label=label, groups=groups, layers=[layer], positions=[str(position)])
    cell = chosen.data[chosen.site].isel(layer=0, position=0).transpose("sample", ...)
    judged = fit_probes(
        cell, chosen.positive, C=C, cv=cv, groups=chosen.groups, index=chosen.index, mask=chosen.mask[0],
        keep=chosen.labelled, class_weight=class_weight, penalty=penalty, l1_ratio=l1_ratio, scale=scale, solver=solver, tol=tol,
        shuffles=0, seed=seed,
    ).isel(layer=0, position=0, C=0)  # fmt: skip
    if judged.auc.isnull():
        raise ProbeError(f"layer {layer}, {position}: {str(judged.reason.item())}")
    rows = np.flatnonzero(chosen.labelled & chosen.mask[0])
    rows = rows[np.argsort(chosen.index[rows], kind="stable")]
    labels, train, one = chosen.positive[None, rows], np.ones((1, len(rows))), np.array([0])
    problem = make_problem(
        cell.values[rows], labels, train, C=np.array([C]), fold=one, label_set=one, scale=scale,
        class_weight=column_class_weights(class_weight, labels, train, fold=one, label_set=one),
        l1_ratio=check_penalty(penalty, l1_ratio),
    )  # fmt: skip
    found = solver_of(solver, problem.l1_ratio)(problem, tol)
    # z = ((x - centre) unit) . w + b, in the coordinates of the stored x
    coef = found.coef[:, 0] * problem.unit[0].cpu().numpy()
    return Probe(
        coef=coef,
        intercept=float(found.intercept[0] - coef @ problem.centre.cpu().numpy()),
        site=chosen.site,
        layer=int(layer),
        position=str(position),
        label=label,
        positive_class=chosen.positive_class,
        identity=chosen.identity,
        fit={
            "C": float(C), "class_weight": judged.attrs["class_weight"], "l1_ratio": problem.l1_ratio, "scale": scale, "solver": judged.attrs.get("solver", solver), "tol": tol, "seed": seed,
            "n": len(rows), "n_positive": int(chosen.positive[rows].sum()), "n_iter": int(found.n_iter[0]),
            "objective": float(found.objective[0]), "gap_bound": float(found.gap_bound[0]),
            "converged": bool(found.converged[0]), "folds": cv, "groups": groups or "question",
            "auc": float(judged.auc), "auc_lo": float(judged.auc_lo), "auc_hi": float(judged.auc_hi),
        },
    )  # fmt: skip
