"""Reference: published grids of AUCs, and a grid beside one of them."""

import csv
from pathlib import Path

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import BadInputError
from hiddenlake.probing.grid import at_one_C


def read_reference(path: str | Path) -> xr.DataArray:
    """Read a grid of published AUCs: a CSV whose first column is `layer`, the others positions.

    Returns (layer, position) float64, NaN where a field is empty. Raises BadInputError naming the line.
    """
    path = Path(path)
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}: expected a CSV of layer x position AUCs") from error
    if not rows or rows[0][:1] != ["layer"] or len(rows[0]) < 2:
        found = ",".join(rows[0][:3]) if rows else "nothing"
        raise BadInputError(f"{path}, line 1: found {found!r}, expected `layer` and then the positions")
    layers, values = [], []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise BadInputError(f"{path}, line {number}: {len(row)} fields, expected {len(rows[0])}")
        try:
            layers.append(int(row[0]))
            values.append([float(field) if field else np.nan for field in row[1:]])
        except ValueError as error:
            raise BadInputError(f"{path}, line {number}: {error}: expected a layer number and AUCs") from error
    return xr.DataArray(
        np.array(values, float).reshape(len(layers), len(rows[0]) - 1),
        {"layer": layers, "position": rows[0][1:]},
        ("layer", "position"),
        name="auc",
    )


def compare_to_csv(grid: xr.Dataset, path: str | Path) -> xr.Dataset:
    """A grid beside a published one, aligned by layer number and position.

    Returns auc, reference and difference (auc - reference) over the union of both layers and positions,
    the grid's positions first; NaN where only one has the cell. Of several C, that of the best cell.
    """
    reference = read_reference(path)
    auc = at_one_C(grid).auc
    ours = [str(p) for p in auc.position.values]
    positions = ours + [p for p in reference.position.values.tolist() if p not in ours]
    layers = sorted(set(auc.layer.values.tolist()) | set(reference.layer.values.tolist()))
    both = {"layer": layers, "position": positions}
    auc, reference = auc.reindex(both), reference.reindex(both)
    out = xr.Dataset({"auc": auc, "reference": reference, "difference": auc - reference})
    out.attrs = {"model": grid.attrs.get("model", ""), "reference": Path(path).stem}
    return out
