"""Cells: the (layer, position) blocks of an array of activations, read one at a time."""

import hashlib
import math

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.store.cells import StoredCells
from hiddenlake.cache.store.device import Allocate


class Cells:
    """Activations by cell.

    activations : (layer, position, sample, hidden), lazy or not, in any order; layer and position may be
        missing, and then there is one of it. Nothing is read before `read`.

    layers, positions : the coordinates; n_samples : length of the sample axis; width : of a row; dtype : of what is
    read. Of a capture's own lazy DataArrays that is the stored dtype.

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
        self._stored = StoredCells.of(activations)
        self.layers = self._coordinate("layer", -1)
        self.positions = self._coordinate("position", "")
        self.n_samples = activations.sizes["sample"]
        self.width = math.prod(n for dim, n in activations.sizes.items() if dim not in (*axes, "sample"))
        self.dtype = self._stored.dtype if self._stored else activations.dtype

    def _coordinate(self, dim: str, missing: int | str) -> np.ndarray:
        if dim in self._activations.coords:
            return np.atleast_1d(self._activations[dim].values)
        return np.arange(self._activations.sizes[dim]) if dim in self._axes else np.array([missing])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.positions)

    def read(
        self, layer: int, position: int, samples: np.ndarray | None = None, allocate: Allocate = np.empty
    ) -> np.ndarray:
        """(sample, hidden) of one cell, by the numbers of its layer and position.

        samples : (n,) int, which, in the order wanted; None for all.  allocate : gives the memory for them.
        """
        if samples is None:
            samples = np.arange(self.n_samples)
        if self._stored is not None:
            return self._stored.read(layer, position, samples, allocate)
        at = {"layer": layer, "position": position}
        cell = self._activations.isel({dim: at[dim] for dim in self._axes})
        values = cell.transpose("sample", ...).values
        # Indices are in range; with the mode "raise" NumPy would fill a buffer of its own first.
        return np.take(values, samples, axis=0, out=allocate((len(samples), self.width), self.dtype), mode="clip")

    def fingerprint(self) -> str:
        """Equal only where the same activations are read. Those of no capture are read for it, a cell at a time."""
        if self._stored is not None:
            return self._stored.fingerprint()
        found = hashlib.sha256(f"{self.shape} {self.dtype.str}".encode())
        for layer, position in np.ndindex(self.shape):
            found.update(np.ascontiguousarray(self.read(layer, position)).view(np.uint8))
        return found.hexdigest()[:32]
