"""Inference over a grid: what the best of many cells is worth, and which cells are above chance.

A nested choice says what the best cell is worth on data that did not choose it. The others compare the labels with their shuffles, which are the same permutations in every cell: what the cells have in common is
in the null too. Cells differ in their number of samples, so AUCs are compared in units of their spread under chance.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hiddenlake.probing.metrics import delong_interval


def standardised(grid: xr.Dataset) -> xr.DataArray:
    """(layer, position, C, label_set): the mean of the folds' AUCs, less one half, in units that make cells comparable.

    The unit is the standard error under chance of scores that were not learned: of Mann and Whitney (1947), the AUC of n1
    positives and n0 negatives has the variance (n1 + n0 + 1) / (12 n1 n0), here with the same share of both in every fold.
    Of cross-validated probes the standard error is larger, in every cell alike (metrics.delong_interval).
    """
    folds = grid.sizes["fold"]
    positive, negative = grid.n_positive / folds, grid.n_negative / folds
    variance = (positive + negative + 1) / (12 * positive * negative) / folds
    return (grid.fold_auc.mean("fold", skipna=False) - 0.5) / np.sqrt(variance.where(variance > 0))


@dataclass(frozen=True, slots=True)
class NestedChoice:
    """The AUC of a cell and C that the data which it is measured on did not choose.

    auc, auc_lo, auc_hi : mean of the folds' AUCs, each in the cell that inner folds chose for it, and its 95 % interval.
    layers, positions, C : of each fold.
    """

    auc: float
    auc_lo: float
    auc_hi: float
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    C: tuple[float, ...]


def nested_choice(grid: xr.Dataset) -> NestedChoice | None:
    """What the best cell is worth: chosen without a fold, scored on it, for each fold (Stone 1974; Varma and Simon 2006).

    A fold's choice has the highest mean AUC on the other folds, of probes trained without it and them. None where the grid
    has no inner folds, or no cell was fitted.
    """
    if "inner_auc" not in grid:
        return None
    at = ("layer", "position", "C")
    inner, auc, variance = (
        one.transpose("fold", *at).values
        for one in (grid.inner_auc, grid.fold_auc.sel(label_set="label"), grid.fold_variance)
    )
    if not np.isfinite(inner).any():
        return None
    folds = np.arange(len(inner))
    chosen = np.nanargmax(inner.reshape(len(inner), -1), axis=1)
    auc, variance = (one.reshape(len(inner), -1)[folds, chosen] for one in (auc, variance))
    low, high = delong_interval(auc, variance)
    layer, position, c = np.unravel_index(chosen, inner.shape[1:])
    return NestedChoice(
        float(auc.mean()), float(low), float(high), tuple(grid.layer.values[layer].tolist()),
        tuple(grid.position.values[position].astype(str).tolist()), tuple(grid.C.values[c].tolist()),
    )  # fmt: skip


def max_t(grid: xr.Dataset) -> float:
    """The p-value of the best cell: the share of shuffles, the labels among them, whose best cell is as good.

    Westfall and Young (1993). It holds for whatever cells and values of C there are, and cannot be below
    1 / (shuffles + 1). NaN without shuffles, or where no cell was fitted.
    """
    found = _of_labels_and_shuffles(grid).stack(cell=("layer", "position", "C"))
    found = found.where(found.notnull().any("label_set"), drop=True)
    if found.sizes["label_set"] < 2 or not found.sizes["cell"]:
        return float("nan")
    best = found.max("cell").values
    best = best[np.isfinite(best)]
    return float((best >= best[0]).mean())


def false_discovery_rate(grid: xr.Dataset) -> xr.DataArray:
    """(layer, position, C): the least rate of false discoveries at which a cell is one (Benjamini and Hochberg 1995).

    A cell's p-value is its place among all cells of all shuffles. NaN without shuffles, and where nothing was fitted.
    """
    found = _of_labels_and_shuffles(grid)
    real, null = found.isel(label_set=0, drop=True), np.sort(found.isel(label_set=slice(1, None)).values, axis=None)
    null = null[np.isfinite(null)]
    if not len(null):
        return xr.full_like(real, np.nan)
    above = len(null) - np.searchsorted(null, real.values, side="left")
    p = np.where(real.notnull(), (above + 1) / (len(null) + 1), np.nan)
    return real.copy(data=_benjamini_hochberg(p))


def _of_labels_and_shuffles(grid: xr.Dataset) -> xr.DataArray:
    """`standardised`, the labels first, without other label sets."""
    names = grid.label_set.values.astype(str)
    return standardised(grid).isel(label_set=(names == "label") | np.char.startswith(names, "shuffled"))


def _benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values, of any shape; NaN stays NaN."""
    there = np.isfinite(p)
    values = p[there]
    order = np.argsort(values)
    ranked = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    out = np.full(p.shape, np.nan)
    out[there] = adjusted
    return out
