"""The paper's figures 2 and 6: the layer x token grid of a captured task, saved and drawn."""

from pathlib import Path
from typing import Any

import xarray as xr

from hiddenlake.cache.store.reader import open_capture
from hiddenlake.probing.experiments.places import Place
from hiddenlake.probing.grid import best_cell
from hiddenlake.probing.plots import draw_comparison, draw_heatmap
from hiddenlake.probing.run import run_grid
from hiddenlake.probing.sweep import Progress


def heatmap(
    place: Place,
    site: str = "mlp_out",
    *,
    compat: str | None = None,
    reference: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[xr.Dataset, list[Path]]:
    """The layer x token grid of a captured task, saved and drawn.

    compat : `llmsknow` for the paper's probe to the letter; else certified ones, cross-validated by group.
    reference : a published grid (CSV), drawn beside it.

    Returns the grid and the pictures.
    """
    kind = f"{site}-{compat}" if compat else site
    grid = run_grid(open_capture(place.capture), site, place.grid(kind), compat=compat, progress=progress)
    pictures = [draw_heatmap(grid, place.picture(kind))]
    if reference is not None:
        pictures.append(draw_comparison(grid, reference, place.picture(f"{kind}-beside")))
    return grid, pictures


def by_position(grid: xr.Dataset) -> list[dict[str, Any]]:
    """What each column of a grid rests on: n of each class, the share of it with a valid exact answer, its best AUC.

    A weak extractor finds the exact answer more often in one class than in the other, and so selects.
    """
    best = best_cell(grid)
    at = grid.sel(C=best.C)
    sides = [name[2:] for name in grid.data_vars if name.startswith("n_") and f"valid_share_{name[2:]}" in grid]
    rows = []
    for position in at.position.values.tolist():
        column = at.sel(position=position)
        row: dict[str, Any] = {"position": position}
        for side in sides:
            row |= {
                f"n {side}": int(column[f"n_{side}"].isel(layer=0)),
                f"valid {side}": round(float(column[f"valid_share_{side}"].isel(layer=0)), 3),
            }
        if bool(column.auc.notnull().any()):
            layer = int(column.auc.argmax("layer"))
            row |= {"best layer": int(column.layer[layer]), "AUC": round(float(column.auc[layer]), 3)}
            row["95 %"] = f"{float(column.auc_lo[layer]):.3f} to {float(column.auc_hi[layer]):.3f}"
            row["token alone"] = round(float(column.token_auc), 3)
        else:
            row["why not"] = str(column.reason.isel(layer=0).item())
        rows.append(row)
    return rows
