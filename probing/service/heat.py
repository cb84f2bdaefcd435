"""Heat: a grid as a page draws it: one number a (layer, position), at one C."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.service.findings import StoredGrid

if TYPE_CHECKING:
    import xarray as xr

# Of every answer; other metrics are asked for by name.
_ALWAYS = ("auc", "auc_lo", "auc_hi", "n", "token_auc")

_CELL = {"layer", "position"}


class Best(BaseModel):
    """The cell of the highest AUC, which is biased upwards for being the best of many."""

    layer: int
    position: str
    C: float
    auc: float
    auc_lo: float
    auc_hi: float


class GridEntry(BaseModel):
    """One grid of a capture."""

    name: str
    site: str
    label: str
    positive_class: str = Field(description="Of what the AUC tells samples.")
    groups: str = Field(description="What stays on one side of every split.")
    n_samples: int = Field(description="Of the capture, when the grid was fitted.")
    best: Best | None = Field(None, description="Absent where no cell was fitted.")
    no_cells: str | None = Field(None, description="Why held-out scores of its cells cannot be had.")
    zarr: str = Field(description="Path of its Zarr group, as it is now: another once the grid is replaced.")
    attrs: dict[str, Any] = Field(description="Everything that the grid says of itself.")


class GridList(BaseModel):
    grids: list[GridEntry]


class Heat(GridEntry):
    """A grid at one C. Rows are layers, columns positions; null where there is no number."""

    layers: list[int]
    positions: list[str]
    C: float
    all_C: list[float]
    positive: str = Field(description="The positive class in a word, as in `n_wrong`.")
    negative: str
    metrics: list[str] = Field(description="Names that `values` can be asked for.")
    values: dict[str, list[list[float | int | None]]] = Field(description="By metric: (layer, position).")
    reasons: list[list[str]] = Field(description="Why a cell has no probe; empty where it has one.")


def entry(grid: StoredGrid, capture: Capture) -> GridEntry:
    """Raises nothing for a grid that lacks some of it: its attributes are anybody's."""
    attrs = plain(grid.attrs)
    best = [attrs.get(f"best_{name}") for name in Best.model_fields]
    return GridEntry(
        name=grid.name,
        site=str(attrs.get("site", "")),
        label=str(attrs.get("label", "")),
        positive_class=str(attrs.get("positive_class", "")),
        groups=str(attrs.get("groups", "")),
        n_samples=int(attrs.get("n_samples", 0)),
        best=None if None in best else Best(**dict(zip(Best.model_fields, best, strict=True))),
        no_cells=no_cells(attrs, capture),
        zarr=f"/v1/captures/{capture.place.name}/grids/{grid.name}/zarr/{grid.edition}",
        # Where the capture lay is the server's business.
        attrs={name: value for name, value in attrs.items() if name != "capture"},
    )


def no_cells(attrs: dict[str, Any], capture: Capture) -> str | None:
    """Why the scores of a grid's cells cannot be computed again, or None where they can."""
    if (compat := attrs.get("compat", "none")) != "none":
        return f"With compat {compat} there is one validation set, and most samples have no held-out score."
    if "positive_class" not in attrs:
        return "This grid has more than two classes."
    if attrs.get("n_samples") != len(capture):
        return f"The grid was fitted on {attrs.get('n_samples')} samples, and the capture holds {len(capture)} now: fit it again."
    return None


def heat(stored: StoredGrid, grid: "xr.Dataset", capture: Capture, C: float | None, metrics: tuple[str, ...]) -> Heat:
    """C : one of the grid's; that of the best cell by default.  metrics : more of them than those of every answer.

    Raises UnknownNameError for a C or a metric that is not there.
    """
    from hiddenlake.probing.saving import classes

    found = entry(stored, capture)
    all_C = [float(c) for c in np.atleast_1d(grid.C.values)]
    at = grid.isel(C=which_C(grid, found, C)) if "C" in grid.dims else grid
    names = [str(name) for name in at.data_vars if _is_metric(at[name])]
    if not set(metrics) <= set(names):
        raise UnknownNameError(f"the grid has no such metric: it has {', '.join(names)}")
    positive, negative = classes(grid)
    counts = (f"n_{positive}", f"n_{negative}")
    wanted = dict.fromkeys(name for name in (*_ALWAYS, *counts, *metrics) if name in names)
    shape = at.auc.transpose("layer", "position")
    return Heat(
        **found.model_dump(),
        layers=[int(layer) for layer in at.layer.values],
        positions=[str(name) for name in at.position.values],
        C=float(at.C),
        all_C=all_C,
        positive=positive,
        negative=negative,
        metrics=names,
        values={name: plain(at[name].broadcast_like(shape).transpose("layer", "position").values) for name in wanted},
        reasons=[[str(one) for one in row] for row in at.reason.transpose("layer", "position").values],
    )


def which_C(grid: "xr.Dataset", found: GridEntry, C: float | None) -> int:
    """Its number along the axis. Raises UnknownNameError."""
    there = grid.C.values.tolist()
    wanted = C if C is not None else found.best.C if found.best is not None else there[0]
    near = [i for i, one in enumerate(there) if math.isclose(one, wanted, rel_tol=1e-6)]
    if not near:
        raise UnknownNameError(f"the grid has no C {wanted:g}: it has {', '.join(f'{one:g}' for one in there)}")
    return near[0]


def plain(value: Any) -> Any:
    """As JSON has it: what is not finite is null, and nobody reads more than seven digits."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _is_metric(values: "xr.DataArray") -> bool:
    return values.dtype.kind in "fiub" and "position" in values.dims and set(values.dims) <= _CELL
