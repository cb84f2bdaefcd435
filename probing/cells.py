"""Cells: the (layer, position) blocks of an array of activations, read one at a time."""

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError


class Cells:
    """Activations by cell.

    activations : (layer, position, sample, hidden), lazy or not, in any order; layer and position may be
        missing, and then there is one of it. Nothing is read before `read`.

    layers, positions : the coordinates; n_samples : length of the sample axis.

    Raises ProbeError for other dimensions.
    """

    def __init__(self, activations: xr.DataArray) -> None:
        axes = [dim for dim in ("layer", "position") if dim in activations.dims]
        if "sample" not in activations.dims:
            raise ProbeError(f"activations have the dimensions {activations.dims}: expected one named `sample`")
        if activations.ndim != len(axes) + 2:
            raise ProbeError(
                f"activations have the dimensions {activations.dims}: expected layer, position, sample, hidden"
            )
        self._activations, self._axes = activations, axes
        self.layers = self._coordinate("layer", -1)
        self.positions = self._coordinate("position", "")
        self.n_samples = activations.sizes["sample"]

    def _coordinate(self, dim: str, missing: int | str) -> np.ndarray:
        if dim in self._activations.coords:
            return np.atleast_1d(self._activations[dim].values)
        return np.arange(self._activations.sizes[dim]) if dim in self._axes else np.array([missing])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.positions)

    def read(self, layer: int, position: int) -> np.ndarray:
        """(sample, hidden) of one cell, by the numbers of its layer and position."""
        at = {"layer": layer, "position": position}
        cell = self._activations.isel({dim: at[dim] for dim in self._axes})
        return cell.transpose("sample", ...).values
