"""Grid: probe metrics over layer x position of one capture and site, with the controls a reader expects."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.compat import MAX_TOKENS
from hiddenlake.probing.controls import CONTROLS, control_task, place_features, random_features, token_types
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.inference import false_discovery_rate, max_t, nested_choice
from hiddenlake.probing.plan import Plan
from hiddenlake.probing.saving import open_grid, save_grid
from hiddenlake.probing.selection import Selection, select
from hiddenlake.probing.sweep import Progress
from hiddenlake.probing.weights import ClassWeight

__all__ = ["BestCell", "at_one_C", "best_cell", "controls_at", "fit_grid", "open_grid", "save_grid"]


def fit_grid(
    capture: Any,
    site: str,
    *,
    label: str = "correct",
    groups: str | None = "group",
    layers: list[int] | None = None,
    positions: list[str] | None = None,
    C: float | tuple[float, ...] = (0.01,),
    cv: int = 5,
    class_weight: ClassWeight = None,
    penalty: str = "l2",
    l1_ratio: float | None = None,
    scale: str = "feature",
    solver: str = "auto",
    tol: float = 1e-6,
    shuffles: int = 19,
    nested: bool | None = None,
    controls: Collection[str] = CONTROLS,
    seed: int = 0,
    compat: str | None = None,
    device: str = "cpu",
    memory: int | None = None,
    processes: int = 1,
    checkpoint: str | Path | None = None,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Fit probes in every cell of a capture's site: at which layer and token is the label known?

    capture : a path, an open capture, or its Dataset.
    site : canonical name, or in the dialect of TransformerLens or Hugging Face.
    label : a per-sample column that is true or false; samples without a value are left out. The positive
        class is true, except for `correct`, whose positive class is the errors.
    groups : a per-sample column whose equal values stay on one side of every split, `gold` for the first
        gold answer, or None for the task's questions. A sample whose group is empty is its question.
    layers, positions : only these; all by default.
    nested : see fit_probes; by default where there are folds enough, three.
    controls : which of CONTROLS are fitted beside the cells; with compat all but `task`.

    The other arguments are those of fit_probes. A cell's samples are those whose token exists and lies in
    the answer; `last_q` and poolings need no answer. With compat="llmsknow" they are the paper's.

    Returns the Dataset of fit_probes and, over (layer, position): the number of samples of each class
    (n_correct, n_wrong), the share of them with a valid exact answer (valid_share_correct, ...), and the
    share of the class that is in the cell (kept_share_correct, ...). Over (position, C), each
    with its interval (_lo, _hi), the same probe on what knows less: token_auc, on `embed`, which knows the token and nothing
    else; random_auc, on a random vector for each token (controls.random_features); place_auc, on where the token stands and
    how long prompt and answer are (controls.place_features). Over (layer, position, C): control_task_auc, of labels that are
    a function of the token alone (controls.control_task), and selectivity, by how much auc is above it. With shuffles, over
    (layer, position, C): q, the false discovery rate at which a cell is above chance. attrs say what was fitted, the
    best cell, and what being the best of many is worth: nested_auc, nested_auc_lo, nested_auc_hi, where layer, position and C
    are chosen on inner folds (nested_layers, nested_positions, nested_C of each fold), and with shuffles the best cell's
    p-value, max_t_p (hiddenlake.probing.inference).

    Raises ProbeError, UnknownNameError.
    """
    chosen = select(
        capture, site, label=label, groups=groups, layers=layers, positions=positions, in_answer=compat is None
    )
    data, keep = chosen.data, chosen.labelled.copy()
    if compat is not None:
        keep &= data.exact_answer_valid.values.astype(bool) & (data.total_length.values <= MAX_TOKENS)
    if unknown := sorted(set(controls) - set(CONTROLS)):
        raise UnknownNameError(f"unknown controls {', '.join(unknown)}: expected some of {', '.join(CONTROLS)}")
    features = _features(chosen, controls, seed)
    others = {}
    if "task" in controls and compat is None:
        others["control_task"] = control_task(token_types(data), chosen.positive, chosen.mask & keep, seed=seed)
    n_cells = (data.sizes["layer"] + len(features)) * data.sizes["position"]
    shared = {
        "C": C,
        "cv": cv,
        "groups": chosen.groups,
        "index": chosen.index,
        "mask": chosen.mask,
        "keep": keep,
        "class_weight": class_weight,
        "penalty": penalty,
        "l1_ratio": l1_ratio,
        "scale": scale,
        "solver": solver,
        "tol": tol,
        "seed": seed,
        "compat": compat,
        "device": device,
        "memory": memory,
        "processes": processes,
        "checkpoint": checkpoint,
    }
    grid = fit_probes(
        data[chosen.site],
        chosen.positive,
        shuffles=shuffles,
        others=others,
        nested=cv > 2 if nested is None else nested,
        planned=planned,  # the controls are smaller
        progress=progress and (lambda done, _: progress(done, n_cells)),
        **shared,
    )
    for k, (name, (values, mask)) in enumerate(features.items()):
        before = (data.sizes["layer"] + k) * data.sizes["position"]
        control = fit_probes(
            values,
            chosen.positive,
            shuffles=0,
            progress=progress and (lambda done, _, before=before: progress(before + done, n_cells)),
            **shared | {"mask": mask},
        )
        for value in ("auc", "auc_lo", "auc_hi"):
            grid[f"{name}_{value}"] = control[value].isel(layer=0, drop=True)
        grid.attrs[f"{name}_converged"] = bool(control.converged.where(control.auc.notnull(), True).all())
    if others:
        grid = _with_selectivity(grid)
    _add_classes(grid, chosen, compat)
    grid.attrs |= {
        "model": str(data.attrs.get("model", "")),
        "task": str(data.attrs.get("task", "")),
        "site": chosen.site,
        "label": label,
        "positive_class": chosen.positive_class,
        "groups": "none: one random split" if compat else groups or "question",
        "n_samples": int(data.sizes["sample"]),
        "n_unlabelled": int((~chosen.labelled).sum()),
        "capture": chosen.path,
        "identity": chosen.digest,
        "hiddenlake": version("hiddenlake"),
    }
    _note_best(grid)
    return grid


# Of what a probe is compared with at its token.
CONTROL_AUCS = ("token_auc", "random_auc", "place_auc", "control_task_auc")


@dataclass(frozen=True, slots=True)
class BestCell:
    """The cell of the highest AUC. Being the best of many, its AUC is biased upwards."""

    layer: int
    position: str
    C: float
    auc: float
    auc_lo: float
    auc_hi: float


def best_cell(grid: xr.Dataset) -> BestCell:
    """The cell of the highest AUC. Raises ProbeError when no cell was fitted."""
    auc = grid.auc.transpose("layer", "position", "C")
    if not auc.notnull().any():
        reasons = sorted(set(grid.reason.values.ravel().tolist()))
        raise ProbeError(f"no cell of {auc.shape[0]} x {auc.shape[1]} was fitted: {'; '.join(reasons[:3])}")
    layer, position, c = np.unravel_index(int(np.nanargmax(auc.values)), auc.shape)
    at = grid.isel(layer=layer, position=position, C=c)
    return BestCell(
        layer=int(at.layer),
        position=str(at.position.item()),
        C=float(at.C),
        auc=float(at.auc),
        auc_lo=float(at.auc_lo),
        auc_hi=float(at.auc_hi),
    )


def at_one_C(grid: xr.Dataset) -> xr.Dataset:
    """The grid without its axis C: of several, the C of the best cell."""
    if "C" not in grid.dims:
        return grid
    return grid.isel(C=0) if grid.sizes["C"] == 1 else grid.sel(C=best_cell(grid).C)


def controls_at(grid: xr.Dataset, layer: int, position: str) -> dict[str, float]:
    """What each control reaches at one cell, of a grid without its axis C: name -> AUC, NaN where it could not be fitted."""
    at = grid.sel(layer=layer, position=position)
    return {name: float(at[name]) for name in CONTROL_AUCS if name in grid}


def _features(chosen: Selection, controls: Collection[str], seed: int) -> dict[str, tuple[xr.DataArray, np.ndarray]]:
    """What the probes of each control see, (position, sample, hidden), and of which samples, (position, sample) bool."""
    data, found = chosen.data, {}
    if "token" in controls:
        found["token"] = data["embed"], chosen.mask
    if "place" in controls:
        found["place"] = place_features(data), chosen.mask
    if "random" in controls:
        types, width = token_types(data), data[chosen.site].shape[-1]
        found["random"] = (
            random_features(types, width, seed=seed, positions=data.position.values),
            chosen.mask & (types >= 0),
        )
    return found


def _with_selectivity(grid: xr.Dataset) -> xr.Dataset:
    """control_task_auc and selectivity, over the folds in which both classes of the control task are on both sides."""
    task, real = (grid.fold_auc.sel(label_set=name, drop=True) for name in ("control_task", "label"))
    grid = grid.sel(label_set=grid.label_set != "control_task")
    grid["control_task_auc"] = task.mean("fold")
    grid["selectivity"] = (real - task).mean("fold")
    return grid


def _note_best(grid: xr.Dataset) -> None:
    n_cells = int(grid.auc.notnull().sum())
    grid.attrs["n_cells"] = n_cells
    if n_cells == 0:
        grid.attrs["note"] = "no cell was fitted: see `reason`"
        return
    best = best_cell(grid)
    nested = nested_choice(grid)
    grid.attrs |= {
        "best_layer": best.layer,
        "best_position": best.position,
        "best_C": best.C,
        "best_auc": best.auc,
        "best_auc_lo": best.auc_lo,
        "best_auc_hi": best.auc_hi,
        "max_relative_gap": float(grid.relative_gap.max()),
        "n_not_converged": n_cells - int(grid.converged.sum()),
    }
    note = f"The best of {n_cells} cells is biased upwards, and its interval does not count the choice"
    if nested is not None:
        grid.attrs |= {f"nested_{name}": getattr(nested, name) for name in ("auc", "auc_lo", "auc_hi")}
        grid.attrs |= {f"nested_{name}": list(getattr(nested, name)) for name in ("layers", "positions", "C")}
        note += (
            f"; chosen on inner folds, the AUC is {nested.auc:.3f} (95 % {nested.auc_lo:.3f} to {nested.auc_hi:.3f}) on "
            f"data that the choice never saw"
        )
    if "shuffled_auc" in grid:
        grid["q"] = false_discovery_rate(grid)
        grid.attrs |= {"max_shuffled_auc": float(grid.shuffled_auc.max()), "max_t_p": max_t(grid)}
        note += (
            f"; with shuffled labels the best cell has {grid.attrs['max_shuffled_auc']:.3f}, and p is "
            f"{grid.attrs['max_t_p']:.2g} (max-T, {grid.sizes['label_set'] - 1} shuffles)"
        )
    grid.attrs["note"] = note + "."


def _add_classes(grid: xr.Dataset, chosen: Selection, compat: str | None) -> None:
    """Number of each class, its share with a valid exact answer, and the share of it that is in the cell."""
    valid = chosen.data.exact_answer_valid.values.astype(bool)
    sides = chosen.labelled & chosen.positive, chosen.labelled & ~chosen.positive
    for name, members, counted in zip(chosen.names, sides, (grid.n_positive, grid.n_negative), strict=True):
        grid[f"n_{name}"], count = counted, counted.values
        with np.errstate(invalid="ignore", divide="ignore"):
            if compat is None:
                inside = chosen.mask & members
                share = (inside & valid).sum(axis=1) / inside.sum(axis=1)
            else:  # rows without a valid exact answer were dropped
                share = np.where(count[0] > 0, 1.0, np.nan)
            kept = count / members.sum()
        grid[f"valid_share_{name}"] = ("layer", "position"), np.broadcast_to(share, count.shape).copy()
        grid[f"kept_share_{name}"] = ("layer", "position"), kept
