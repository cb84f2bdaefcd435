"""Stored cells: the cells of a lazy DataArray of a capture, read as they are stored, into the caller's memory."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import xarray as xr
from xarray.core import indexing

from hiddenlake.cache.identity import digest
from hiddenlake.cache.store.device import Allocate
from hiddenlake.cache.store.moment import Moment
from hiddenlake.cache.store.view import Lazy, lazy_of


@dataclass(frozen=True, eq=False, slots=True)
class StoredCells:
    """What `Capture.dataset()` shows of one site, or a part of it that xarray has selected without reading.

    lazy : the whole site.
    axes : for layer, where there are some, and position: the axis's name in the DataArray, None where it has one index
        only, and its indices.
    rows : (sample,) the capture's samples, in the DataArray's order.
    """

    lazy: Lazy
    axes: tuple[tuple[str | None, np.ndarray], ...]
    rows: np.ndarray

    @classmethod
    def of(cls, array: xr.DataArray) -> Self | None:
        """None where the DataArray is something else, or a part that is not made of whole rows."""
        lazy = lazy_of(array)
        if lazy is None or isinstance(lazy.key, indexing.VectorizedIndexer):
            return None
        *leading, width = lazy.key.tuple
        names = iter(array.dims)
        axes = [
            (None if isinstance(key, (int, np.integer)) else next(names), np.atleast_1d(np.arange(length)[key]))
            for key, length in zip(leading, lazy.array.shape, strict=False)
        ]
        whole = isinstance(width, slice) and len(range(lazy.array.shape[-1])[width]) == lazy.array.shape[-1]
        if axes[-1][0] != "sample" or not whole or (width.step or 1) != 1:
            return None
        return cls(lazy.array, tuple(axes[:-1]), axes[-1][1])

    @property
    def dtype(self) -> np.dtype:
        """As the capture stores it: float32, float16, or bfloat16 of ml_dtypes."""
        return self.lazy.as_stored(None).dtype

    @property
    def width(self) -> int:
        return self.lazy.shape[-1]

    def read(self, layer: int, position: int, samples: np.ndarray, allocate: Allocate) -> np.ndarray:
        """(len(samples), width) of `dtype`, checked, by number along each axis of the DataArray.

        allocate : gives the memory that is filled and returned.

        Raises CorruptError, StoreError.
        """
        at = {"layer": layer, "position": position, None: 0}
        outer = [indices[at[name]] for name, indices in self.axes]
        out = allocate((*(1 for _ in outer), len(samples), self.width), self.dtype)
        self.lazy.read(self.lazy.site, [[index] for index in outer], self.rows[samples], "stored", out=out)
        return out.reshape(len(samples), self.width)

    def fingerprint(self) -> str:
        """32 hex digits, equal only where the same committed bytes are read in the same order."""
        snapshot: Moment = self.lazy.read.__self__
        return digest(
            {
                "identity": snapshot.identity,
                "site": self.lazy.site,
                "axes": [[name, indices.tolist()] for name, indices in self.axes],
                "samples": snapshot.keys[self.rows].tolist(),
                "bytes": snapshot.fingerprint(self.lazy.site),
            }
        )
