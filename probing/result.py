"""Result: the cells of a sweep, as one Dataset over (layer, position, C, fold, label_set)."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hiddenlake.probing.cell import Cell
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.classification import METRICS

_PER_FOLD = ("fold_auc", "fold_objective", "fold_gap_bound", "fold_n_iter", "fold_converged")
_PER_CELL = ("auc", "auc_lo", "auc_hi", "shuffled_auc")
# What some ways of fitting have.
_SOME = ("auc_certified_lo", "auc_certified_hi", "fold_variance", "inner_auc", "inner_gap")


def assemble(
    cells: Cells,
    fitted: dict[tuple[int, int], Cell],
    *,
    C: np.ndarray,
    n_folds: int,
    n_shuffles: int,
    others: Sequence[str] = (),
    tol: float = 0.0,
) -> xr.Dataset:
    """The Dataset that fit_probes describes, from what was fitted by (layer number, position number).

    others : names of the label sets behind the shuffles.  tol : of the relative gap of inner probes.

    Cells without probes are NaN (n_iter -1, converged False) and have a `reason`.
    """
    dims = ("layer", "position", "C", "fold", "label_set")
    coords = {
        "layer": cells.layers,
        "position": cells.positions,
        "C": C,
        "fold": np.arange(n_folds),
        "label_set": ["label", *(f"shuffled_{r}" for r in range(n_shuffles)), *others],
    }
    sizes = tuple(len(coords[dim]) for dim in dims)
    fill = {"fold_n_iter": np.int32(-1), "fold_converged": False}
    data = {name: np.full(sizes, fill.get(name, np.nan)) for name in _PER_FOLD}
    data |= {name: np.full(sizes[:3], np.nan) for name in _PER_CELL}
    counts = {name: np.zeros(sizes[:2], np.int32) for name in ("n_positive", "n_negative")}
    reason = np.full(sizes[:2], "", object)
    for at, cell in fitted.items():
        counts["n_positive"][at], counts["n_negative"][at], reason[at] = cell.n_positive, cell.n_negative, cell.reason
        if not cell.reason:
            for name in (*_PER_FOLD, *_PER_CELL):
                data[name][at] = getattr(cell, name)
            some = {name: getattr(cell, name) for name in _SOME if getattr(cell, name) is not None}
            for name, values in (some | cell.metrics).items():
                data.setdefault(name, np.full((*sizes[:2], *values.shape), np.nan))[at] = values
    out = xr.Dataset({name: (dims[: values.ndim], values) for name, values in data.items()}, coords)
    for name, meaning in METRICS.items():
        if name in out:
            out[name].attrs["long_name"] = meaning
    if n_shuffles == 0:
        out = out.drop_vars("shuffled_auc")
    relative = out.fold_gap_bound / out.fold_objective
    out["objective"] = out.fold_objective.isel(label_set=0, drop=True).mean("fold")
    out["gap_bound"] = out.fold_gap_bound.max(("fold", "label_set"))
    out["relative_gap"] = relative.max(("fold", "label_set"))
    out["n_iter"] = out.fold_n_iter.max(("fold", "label_set"))
    # A shuffle that was not fitted is no failure to converge.
    out["converged"] = (out.fold_converged | out.fold_objective.isnull()).all(("fold", "label_set")) & out.auc.notnull()
    if "inner_gap" in out:
        out["converged"] &= out.inner_gap <= tol
        out["relative_gap"] = np.maximum(out.relative_gap, out.inner_gap)
        out = out.drop_vars("inner_gap")
    out["n"] = ("layer", "position"), counts["n_positive"] + counts["n_negative"]
    for name, values in counts.items():
        out[name] = ("layer", "position"), values
    out["reason"] = ("layer", "position"), reason
    return out
