"""fit_multiclass: activations and labels of more than two values in, a Dataset of certified models out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.class_cell import ClassCell, ClassDesign, fit_class_cell
from hiddenlake.probing.controls import shuffle_labels
from hiddenlake.probing.design import check_names, repeating
from hiddenlake.probing.fit import one_per_sample, token_mask
from hiddenlake.probing.solve import MIN_PER_FOLD
from hiddenlake.probing.splits import make_folds
from hiddenlake.probing.sweep import Progress, sweep
from hiddenlake.probing.weights import check_sample_weight

_FILL = {"fold_n_iter": -1, "fold_converged": False, "confusion": 0}


def fit_multiclass(
    activations: xr.DataArray,
    y: Sequence | np.ndarray,
    *,
    multiclass: str = "softmax",
    C: float | Sequence[float] = (0.01,),
    cv: int = 5,
    groups: Sequence | np.ndarray | None = None,
    index: Sequence | np.ndarray | None = None,
    mask: xr.DataArray | np.ndarray | None = None,
    keep: Sequence | np.ndarray | None = None,
    sample_weight: Sequence | np.ndarray | None = None,
    class_weight: str | None = None,
    scale: str = "feature",
    tol: float = 1e-6,
    shuffles: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Tell more than two classes apart in every cell of `activations`, cross-validated, each fit with a certificate.

    y : (sample,) strings or integers, the class. Of those in `keep` each class needs two samples in every fold.
    multiclass : `softmax`, one multinomial model, or `ovr`, each class against the rest, whose probabilities are scaled to
        sum to 1.
    class_weight : None, or `balanced`: all classes weigh alike in a fit; with `ovr`, each class as much as the rest.

    The other arguments are those of fit_probes, and so are the samples of a cell.

    Returns a Dataset. Over (layer, position, C): auc, the mean over folds and classes of the AUC of a class against the rest,
    with its 95 % interval auc_lo, auc_hi (DeLong; of whole groups, Obuchowski, where groups repeat), shuffled_auc; accuracy,
    majority_accuracy and log_loss (nats) of all held-out probabilities together; objective (mean over folds), gap_bound,
    relative_gap, n_iter (the largest over folds and label sets) and converged. class_auc, class_auc_lo and class_auc_hi have
    the dimension `class` too, and confusion, the counts of held-out samples by their class and by the most probable one,
    `class` and `predicted`. Over (layer, position, C, fold, label_set): fold_auc, fold_objective, fold_gap_bound,
    fold_n_iter, fold_converged. Over (layer, position): n, reason, and, with `class`, n_class.

    Raises ProbeError, UnknownNameError.
    """
    cells = Cells(activations)
    n = cells.n_samples
    kept = np.ones(n, bool) if keep is None else one_per_sample(keep, n, "keep").astype(bool)
    values = one_per_sample(y, n, "y")
    truth, classes = _number(values, kept, cv)
    names = np.arange(n) if index is None else one_per_sample(index, n, "index")
    group_names = names if groups is None else one_per_sample(groups, n, "groups")
    check_names(names, shuffles)
    labels, fold = np.zeros((1 + shuffles, n), int), np.full(n, -1)
    fold[kept] = make_folds(truth[kept], n_folds=cv, groups=group_names[kept], seed=seed)
    labels[0] = truth
    together = None if repeating(group_names, kept) is None else group_names[kept]
    labels[1:, kept] = shuffle_labels(truth[kept], names[kept], groups=together, n=shuffles, seed=seed)
    design = ClassDesign(
        labels=labels, classes=classes, multiclass=multiclass, fold=fold, n_folds=cv,
        C=np.atleast_1d(np.asarray(C, np.float64)), group=repeating(group_names, kept), scale=scale, tol=tol,
        sample_weight=check_sample_weight(np.ones(n) if sample_weight is None else sample_weight, truth == 0, kept),
        class_weight=class_weight,
    )  # fmt: skip

    def fit(X: np.ndarray, rows: np.ndarray, position: int) -> ClassCell:
        return fit_class_cell(X, rows, design)

    order = np.argsort(names.astype(str), kind="stable")
    fitted = sweep(cells, token_mask(mask, cells), kept, fit, order=order, progress=progress)
    result = _assemble(cells, fitted, design)
    result.attrs = {
        "cv": cv,
        "C": design.C.tolist(),
        "scale": scale,
        "multiclass": multiclass,
        "tol": tol,
        "sample_weight": "none" if sample_weight is None else "given",
        "class_weight": class_weight or "none",
        "shuffles": shuffles,
        "seed": seed,
        "n": int(kept.sum()),
        "n_groups": len(set(group_names[kept].tolist())),
        "interval": "95 %, DeLong over folds" if design.group is None else "95 %, Obuchowski over folds",
    }
    return result


def _number(values: np.ndarray, kept: np.ndarray, cv: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """((sample,) int, the number of each kept sample's class, the classes' names in order)."""
    here = values[kept].tolist()
    if any(value is None or value != value for value in here):
        raise ProbeError("y is None or NaN for some samples: leave them out with `keep`")
    count = Counter(here)
    classes = sorted(count, key=lambda value: (str(type(value)), value))
    if len(classes) < 3:
        raise ProbeError(f"y has {len(classes)} classes: expected three or more; fit_probes tells two apart")
    if rare := [value for value in classes if count[value] < MIN_PER_FOLD * cv]:
        raise ProbeError(
            f"{len(rare)} of {len(classes)} classes have fewer than {MIN_PER_FOLD} samples for each of {cv} folds, e.g. "
            f"{str(rare[0])!r} {count[rare[0]]}: leave them out with `keep`, or use fewer folds"
        )
    number = {value: k for k, value in enumerate(classes)}
    return np.array([number.get(value, 0) for value in values.tolist()]), tuple(map(str, classes))


def _assemble(cells: Cells, fitted: dict[tuple[int, int], ClassCell], design: ClassDesign) -> xr.Dataset:
    """Cells without models are NaN (n_iter -1, converged False, confusion 0) and have a `reason`."""
    coords = {
        "layer": cells.layers,
        "position": cells.positions,
        "C": design.C,
        "class": list(design.classes),
        "predicted": list(design.classes),
        "fold": np.arange(design.n_folds),
        "label_set": ["label", *(f"shuffled_{r}" for r in range(len(design.labels) - 1))],
    }
    per_cell = ("auc", "auc_lo", "auc_hi", "accuracy", "majority_accuracy", "log_loss")
    per_fold = ("fold_auc", "fold_objective", "fold_gap_bound", "fold_n_iter", "fold_converged")
    dims = {name: ("C",) for name in per_cell}
    dims |= {name: ("C", "class") for name in ("class_auc", "class_auc_lo", "class_auc_hi")}
    dims |= {"confusion": ("C", "class", "predicted")} | {name: ("C", "fold", "label_set") for name in per_fold}
    dims = {"n_class": ("class",), "reason": ()} | dims
    fill = _FILL | {"n_class": 0, "reason": ""}
    dims = {name: ("layer", "position", *rest) for name, rest in dims.items()}
    data = {
        name: np.full([len(coords[dim]) for dim in its], fill.get(name, np.nan), object if name == "reason" else None)
        for name, its in dims.items()
    }
    for at, cell in fitted.items():
        data["n_class"][at], data["reason"][at] = cell.n_class, cell.reason
        for name, values in ((cell.per_fold or {}) | (cell.values or {})).items():
            data[name][at] = values
    out = xr.Dataset({name: (dims[name], values) for name, values in data.items()}, coords)
    over = ("fold", "label_set")
    if len(design.labels) > 1:
        out["shuffled_auc"] = out.fold_auc.isel(label_set=slice(1, None)).mean(over)
    out["objective"] = out.fold_objective.isel(label_set=0, drop=True).mean("fold", skipna=False)
    out["gap_bound"], out["n_iter"] = out.fold_gap_bound.max(over), out.fold_n_iter.max(over)
    out["relative_gap"] = (out.fold_gap_bound / out.fold_objective).max(over)
    # A shuffle that was not fitted is no failure to converge.
    out["converged"] = (out.fold_converged | out.fold_objective.isnull()).all(over) & out.auc.notnull()
    out["n"] = out.n_class.sum("class")
    return out
