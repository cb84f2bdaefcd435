"""Multiclass grid: fit_multiclass over layer x position of one capture and site, by a column of more than two values."""

from importlib.metadata import version
from typing import Any

import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.multiclass import fit_multiclass
from hiddenlake.probing.selection import label_values, select_samples


def fit_multiclass_grid(
    capture: Any,
    site: str,
    *,
    label: str,
    classes: list[Any] | None = None,
    groups: str | None = "group",
    layers: list[int] | None = None,
    positions: list[str] | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Fit models of a column of three or more values in every cell of a capture's site.

    capture, site, groups, layers, positions : as in fit_grid, and so are the samples of a cell.
    label : a per-sample column; samples without a value, or with an empty one, are left out.
    classes : only samples of these values, as they are in the column; of all by default.
    settings : of fit_multiclass: multiclass, C, cv, class_weight, scale, tol, shuffles, seed, progress.

    Returns the Dataset of fit_multiclass, which save_grid and best_cell take; attrs say what was fitted.

    Raises ProbeError, UnknownNameError.
    """
    chosen = select_samples(capture, site, groups=groups, layers=layers, positions=positions)
    values, labelled = label_values(chosen.data, label)
    keep = labelled & (values != "")
    if classes is not None:
        there = set(values[keep].tolist())
        if missing := [value for value in classes if value not in there]:
            raise ProbeError(f"no sample has {label!r} {missing[0]!r}: the column has {sorted(map(str, there))[:10]}")
        keep &= [value in classes for value in values.tolist()]
    grid = fit_multiclass(
        chosen.data[chosen.site], values, groups=chosen.groups, index=chosen.index, mask=chosen.mask, keep=keep,
        **settings,
    )  # fmt: skip
    grid.attrs |= {
        "model": str(chosen.data.attrs.get("model", "")),
        "task": str(chosen.data.attrs.get("task", "")),
        "site": chosen.site,
        "label": label,
        "groups": groups or "question",
        "n_samples": int(chosen.data.sizes["sample"]),
        "n_unlabelled": int((~keep).sum()),
        "capture": chosen.path,
        "identity": chosen.digest,
        "hiddenlake": version("hiddenlake"),
    }
    return grid
