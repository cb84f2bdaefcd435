"""Saving: grids as Zarr groups that plain xarray reads."""

import os
import shutil
import uuid
import warnings
from pathlib import Path

import xarray as xr

from hiddenlake.cache.errors import StoreError


def save_grid(grid: xr.Dataset, path: str | Path) -> Path:
    """Write a grid as a Zarr group; an earlier one at the same path is replaced when the new one is whole.

    Returns the path. `xarray.open_zarr(path)` reads it. Raises StoreError when the folder cannot be written,
    or holds something that is no Zarr group.
    """
    path = Path(path)
    check_target(path)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Zarr 3 says that consolidated metadata is not in its specification yet. It is what lets
            # xarray open a grid over HTTP, and a reader without it ignores it.
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            _plain(grid).to_zarr(new, mode="w", consolidated=True)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}: the grid was not saved") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return path


def check_target(path: Path) -> None:
    """Raise StoreError where something lies that is no grid."""
    if path.exists() and not (path / "zarr.json").exists():
        raise StoreError(f"{path} exists and is no Zarr group: name another path, or remove it")


def open_grid(path: str | Path) -> xr.Dataset:
    """Read a saved grid into memory. Raises StoreError when there is none."""
    path = Path(path)
    if not (path / "zarr.json").exists():
        raise StoreError(f"{path} holds no grid: expected a folder that save_grid wrote")
    with xr.open_zarr(path) as grid:
        return grid.load()


def classes(grid: xr.Dataset) -> tuple[str, str]:
    """Names of the positive and the negative class, as a grid's variables have them (`n_wrong`, `n_correct`)."""
    return ("wrong", "correct") if "n_wrong" in grid else ("positive", "negative")


def _plain(grid: xr.Dataset) -> xr.Dataset:
    """Fixed-width text is not in Zarr 3's specification; text of any length is. One chunk a variable."""
    text = {name: grid[name].astype(object) for name in grid.variables if grid[name].dtype.kind == "U"}
    grid = grid.assign({k: v for k, v in text.items() if k in grid.data_vars})
    return grid.assign_coords({k: v for k, v in text.items() if k in grid.coords})
