"""Again: a cell of a saved grid, fitted once more for what a grid does not keep: each sample's held-out score."""

import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.held_out import held_out
from hiddenlake.probing.report.facts import arguments

# A mean of five AUCs of a hundred samples changes by less where two of them change places for rounding.
_SAME_AUC = 1e-3


class ChangedError(ProbeError):
    """What a grid says is not so any more."""


def fit_again(capture: Capture, grid: xr.Dataset, layer: int, position: str, C: float) -> xr.Dataset:
    """What `held_out` returns for a cell of a grid of this capture, fitted as the grid was.

    C : one of the grid's.

    Raises ChangedError where the cell's AUC is another than in the grid, and what held_out does.
    """
    site = grid.attrs["site"]
    found = held_out(capture, site, layer, position, C=C, **arguments(grid))
    now, then = found.attrs["auc"], float(grid.auc.sel(layer=layer, position=position, C=C))
    if not abs(now - then) <= _SAME_AUC:
        raise ChangedError(
            f"layer {layer}, {position} of {site} has AUC {now:.4f} now, and {then:.4f} in the grid: the labels or groups of "
            f"{capture.path} have changed since: fit it again"
        )
    return found
