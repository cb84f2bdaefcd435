"""Inference over a grid: what the best of many cells is worth, and which cells are above chance.

Both compare the labels with their shuffles, which are the same permutations in every cell: what the cells have in common is
in the null too. Cells differ in their number of samples, so AUCs are compared in units of their spread under chance.
"""

import numpy as np
import xarray as xr


def standardised(grid: xr.Dataset) -> xr.DataArray:
    """(layer, position, C, label_set): the mean of the folds' AUCs, less one half, over its standard error under chance.

    Of Mann and Whitney (1947): the AUC of n1 positives and n0 negatives has the variance (n1 + n0 + 1) / (12 n1 n0), here
    with the same share of both in every fold.
    """
    folds = grid.sizes["fold"]
    positive, negative = grid.n_positive / folds, grid.n_negative / folds
    variance = (positive + negative + 1) / (12 * positive * negative) / folds
    return (grid.fold_auc.mean("fold", skipna=False) - 0.5) / np.sqrt(variance.where(variance > 0))


def max_t(grid: xr.Dataset) -> float:
    """The p-value of the best cell: the share of shuffles, the labels among them, whose best cell is as good.

    Westfall and Young (1993). It holds for whatever cells and values of C there are, and cannot be below
    1 / (shuffles + 1). NaN without shuffles, or where no cell was fitted.
    """
    found = standardised(grid).stack(cell=("layer", "position", "C"))
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
    found = standardised(grid)
    real, null = found.isel(label_set=0, drop=True), np.sort(found.isel(label_set=slice(1, None)).values, axis=None)
    null = null[np.isfinite(null)]
    if not len(null):
        return xr.full_like(real, np.nan)
    above = len(null) - np.searchsorted(null, real.values, side="left")
    p = np.where(real.notnull(), (above + 1) / (len(null) + 1), np.nan)
    return real.copy(data=_benjamini_hochberg(p))


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
