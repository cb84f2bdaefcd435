"""fit_probes: activations and labels in, a Dataset of certified probes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.cell import Cell, fit_cell
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.checkpoint import Checkpoint
from hiddenlake.probing.compat import fit_llmsknow
from hiddenlake.probing.design import make_design
from hiddenlake.probing.plan import Plan, make_plan
from hiddenlake.probing.result import assemble
from hiddenlake.probing.solve import left_out
from hiddenlake.probing.solvers.place import check_device, device_memory
from hiddenlake.probing.sweep import Progress, sweep
from hiddenlake.probing.weights import ClassWeight


def fit_probes(
    activations: xr.DataArray,
    y: Sequence | np.ndarray,
    *,
    C: float | Sequence[float] = (0.01,),
    cv: int = 5,
    groups: Sequence | np.ndarray | None = None,
    index: Sequence | np.ndarray | None = None,
    mask: xr.DataArray | np.ndarray | None = None,
    keep: Sequence | np.ndarray | None = None,
    sample_weight: Sequence | np.ndarray | None = None,
    class_weight: ClassWeight = None,
    penalty: str = "l2",
    l1_ratio: float | None = None,
    scale: str = "feature",
    solver: str = "auto",
    tol: float = 1e-6,
    shuffles: int = 19,
    others: Mapping[str, np.ndarray] | None = None,
    nested: bool = False,
    seed: int = 0,
    compat: str | None = None,
    device: str = "cpu",
    memory: int | None = None,
    processes: int = 1,
    checkpoint: str | Path | None = None,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Fit logistic probes in every cell of `activations`, cross-validated, each with a certificate.

    activations : (layer, position, sample, hidden), any float, lazy or not; `layer` and `position` may be missing. Cells
        are read one after the other; those of a capture as they are stored.
    y : (sample,) bool, True for the positive class.
    C : inverse strength of the penalty, as in scikit-learn. Several keep an axis of their own.
    groups : (sample,) names that stay on one side of every split; each sample its own by default.
    index : (sample,) distinct names that folds and shuffles follow, e.g. the task index; the order of
        the samples by default.
    mask : (position, sample) bool, the tokens that count; by default those that are all finite.
    keep : (sample,) bool, the samples that count; all by default. Folds are made of these.
    sample_weight : (sample,) what each sample counts in a fit, at least 0; 1 each by default. Held-out samples count
        alike.
    class_weight : None, `balanced` (each class half of what the training samples of a fold weigh, as in scikit-learn), or
        weights by False and True. The certificate is that of the weighted problem.
    penalty, l1_ratio : `l2`; `l1`; or `elasticnet`, l1_ratio of it l1. With an l1 part, columns are fitted one after the
        other by scikit-learn's coordinate descent, which takes up to minutes a column where features are many and
        l1_ratio is small; the certificate of l1 bounds the objective, and no distance of the weights, so that the
        optimum's auc is not bounded.
    scale : `feature`, `rms` or `none`, from the training rows of each fold. Centring needs no choice: the
        intercept is free.
    tol : a probe has converged when gap_bound <= tol * objective.
    shuffles : how many permutations of the labels are fitted beside them.
    others : name -> (position, sample) or (sample,) bool, label sets that are fitted beside the labels, in the same folds.
    nested : also fit the labels with every two folds left out, for a choice of cells by inner folds
        (inference.nested_choice). Twice the work, or less beside shuffles or several C.
    compat : `llmsknow` fits the probe of "LLMs Know More Than They Show" to the letter and takes C, cv,
        groups, scale, solver, shuffles and device, a CPU, from there (hiddenlake.probing.compat).
    device : `cpu`, `cuda` or `cuda:1`, what `auto` and `newton` solve on. `cuml` takes the GPU that CuPy does.
    memory : bytes for activations and solvers, half of the machine's by default. So many cells are worked on at once as
        fit, or else their columns in batches; refused where one does not (hiddenlake.probing.plan).
    processes : how many on this machine share the memory, the cores and, through `checkpoint`, the cells.
    checkpoint : a folder where each finished cell is kept. The same call goes on from there, also while other processes
        work on it, to the same bits; a call that asks for anything else takes nothing from it. `run_grid` also
        removes it.
    planned : told the plan before the work starts.
    progress : called with (cells done, cells in all).

    Returns a Dataset. Over (layer, position, C): auc, the mean of the folds' AUCs, with its 95 %
    interval auc_lo, auc_hi (DeLong; bootstrap of whole groups where groups repeat), auc_certified_lo and
    auc_certified_hi, between which the optimum's auc lies (`certified_auc`), the metrics of all held-out
    probabilities together (`classification.METRICS`: auprc, base_rate, accuracy, ...), shuffled_auc,
    objective (mean over folds), gap_bound, relative_gap (gap_bound / objective) and n_iter (each the largest
    over folds and label sets) and converged (all of them). Over (layer, position, C, fold, label_set): fold_auc,
    fold_objective, fold_gap_bound, fold_n_iter, fold_converged. Over (layer, position, C, fold): fold_variance of the
    labels' fold_auc and, if nested, inner_auc, the mean AUC of the other folds without this one. Over (layer, position): n, n_positive,
    n_negative and reason. A cell with too few samples is NaN, and `reason` says why.

    Raises ProbeError when the samples cannot be split at all, UnknownNameError for an unknown `compat`.
    """
    cells = Cells(activations)
    n = cells.n_samples
    positive = one_per_sample(y, n, "y").astype(bool)
    kept = np.ones(n, bool) if keep is None else one_per_sample(keep, n, "keep").astype(bool)
    mask = token_mask(mask, cells)
    if compat is not None:
        if compat != "llmsknow":
            raise UnknownNameError(f"unknown compat {compat!r}: expected `llmsknow` or None")
        if sample_weight is not None or class_weight is not None or penalty != "l2":
            raise ProbeError("compat='llmsknow' is the paper's fit, l2 without weights: leave these or compat out")
        decides = {"compat": compat, "positive": positive, "seed": seed}
        kept_cells = _checkpoint(checkpoint, cells, mask, kept, decides)
        return fit_llmsknow(cells, positive, mask=mask, keep=kept, seed=seed, checkpoint=kept_cells, progress=progress)
    names = np.arange(n) if index is None else one_per_sample(index, n, "index")
    group_names = names if groups is None else one_per_sample(groups, n, "groups")
    design = make_design(
        positive, kept=kept, names=names, groups=group_names, C=C, cv=cv, scale=scale, solver=solver, tol=tol,
        shuffles=shuffles, seed=seed, sample_weight=sample_weight, class_weight=class_weight,
        penalty=penalty, l1_ratio=l1_ratio, nested=nested,
        others=_others(others, cells), device=device,
    )  # fmt: skip
    on = check_device(device)
    n = int((kept if mask is None else kept & mask).sum(-1).max())
    plan = make_plan(
        n, cells.width, cells.dtype.itemsize, columns=len(design.C) * design.label_sets(0).shape[0], n_folds=cv,
        n_masks=len(left_out(cv, nested)), memory=memory, device_memory=device_memory(on),
        processes=processes,
    )  # fmt: skip
    if planned is not None:
        planned(plan)
    design = replace(design, columns_at_once=plan.columns)
    plan = replace(plan, threads=max(1, plan.threads // processes))

    def fit(X: np.ndarray, rows: np.ndarray, position: int) -> Cell:
        return fit_cell(X, rows, design, position)

    # Of several GPUs each may take cells of the same grid.
    decides = {f.name: getattr(design, f.name) for f in fields(design)} | {"device": on.type}
    kept_cells = _checkpoint(checkpoint, cells, mask, kept, decides)
    fitted = sweep(cells, mask, kept, fit, order=design.order, plan=plan, checkpoint=kept_cells, progress=progress)
    result = assemble(cells, fitted, C=design.C, n_folds=cv, n_shuffles=shuffles, others=tuple(others or ()), tol=tol)
    result.attrs = {
        "cv": cv,
        "C": design.C.tolist(),
        "scale": scale,
        "solver": design.solver_name,
        "tol": tol,
        "sample_weight": "none" if sample_weight is None else "given",
        "class_weight": str(design.class_weight or "none"),
        "l1_ratio": design.l1_ratio,
        "shuffles": shuffles,
        "seed": seed,
        "compat": "none",
        "device": on.type,
        "n": int(kept.sum()),
        "n_groups": len(set(group_names[kept].tolist())),
        "interval": design.interval,
    }
    return result


def _checkpoint(
    folder: str | Path | None, cells: Cells, mask: np.ndarray | None, kept: np.ndarray, decides: dict[str, Any]
) -> Checkpoint | None:
    """decides : what decides the numbers beside the activations and who counts."""
    if folder is None:
        return None
    return Checkpoint(
        Path(folder),
        decides
        | {
            "activations": cells.fingerprint(),
            "layers": cells.layers,
            "positions": cells.positions,
            "mask": mask,
            "kept": kept,
        },
    )


def one_per_sample(values: Sequence | np.ndarray, n: int, name: str) -> np.ndarray:
    """Raises ProbeError for another number of values than samples."""
    values = np.asarray(values)
    if values.shape != (n,):
        raise ProbeError(f"{name} has the shape {values.shape}: expected one value for each of the {n} samples")
    return values


def _others(others: Mapping[str, np.ndarray] | None, cells: Cells) -> np.ndarray | None:
    """(S, position, sample) bool, from label sets that may lack the position."""
    if not others:
        return None
    sets = [values if np.ndim(values) == 2 else np.asarray(values)[None] for values in others.values()]
    return np.stack([np.broadcast_to(np.asarray(one, bool), (len(cells.positions), cells.n_samples)) for one in sets])


def token_mask(mask: xr.DataArray | np.ndarray | None, cells: Cells) -> np.ndarray | None:
    """(position, sample) bool, from a mask that may lack the position. Raises ProbeError for another shape."""
    if mask is None:
        return None
    if isinstance(mask, xr.DataArray) and mask.ndim == 2:
        mask = mask.transpose("position", "sample")
    values = np.asarray(mask, bool)
    expected = (len(cells.positions), cells.n_samples)
    if values.ndim == 1:
        values = np.broadcast_to(values, expected)
    if values.shape != expected:
        raise ProbeError(f"mask has the shape {values.shape}: expected (position, sample) = {expected}")
    return values
