"""Grid: probe metrics over layer x position of one capture and site, with the controls a reader expects."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.positions import ABSENT, POOLS
from hiddenlake.cache.sites import parse_site
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.probing.compat import MAX_TOKENS
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.inference import false_discovery_rate, max_t
from hiddenlake.probing.saving import open_grid, save_grid
from hiddenlake.probing.sweep import Progress

__all__ = ["BestCell", "at_one_C", "best_cell", "cross_selected_auc", "fit_grid", "open_grid", "save_grid"]

# Names of the (positive, negative) class in the grid. A probe of `correct` detects errors: the wrong
# answers are its positive class, as in "LLMs Know More Than They Show".
_CLASSES = {"correct": ("wrong", "correct")}


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
    scale: str = "feature",
    solver: str = "auto",
    tol: float = 1e-6,
    shuffles: int = 1,
    seed: int = 0,
    compat: str | None = None,
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

    The other arguments are those of fit_probes. A cell's samples are those whose token exists and lies in
    the answer; `last_q` and poolings need no answer. With compat="llmsknow" they are the paper's.

    Returns the Dataset of fit_probes and, over (layer, position): the number of samples of each class
    (n_correct, n_wrong), the share of them with a valid exact answer (valid_share_correct, ...), and the
    share of the class that is in the cell (kept_share_correct, ...). Over (position, C): token_auc,
    token_auc_lo, token_auc_hi, the same probe on `embed`, which knows the token and nothing else. With shuffles, over
    (layer, position, C): q, the false discovery rate at which a cell is above chance. attrs say what was fitted, the
    best cell, and what being the best of many is worth: with shuffles its p-value, max_t_p (hiddenlake.probing.inference).

    Raises ProbeError, UnknownNameError.
    """
    data, path = _open(capture)
    site = _site(data, site)
    data = _select(data, layers, positions)
    value, labelled = _label(data, label)
    if not labelled.any():
        raise ProbeError(f"no sample has a value of {label!r}: add the label, or name another column")
    token_index = data.token_index.transpose("position", "sample").values
    mask = token_index != ABSENT
    keep = labelled.copy()
    if compat is None:
        in_answer = data.in_answer.transpose("position", "sample").values.astype(bool)
        mask &= in_answer | np.isin(data.position.values.astype(str), ["last_q", *POOLS])[:, None]
    else:
        keep &= data.exact_answer_valid.values.astype(bool) & (data.total_length.values <= MAX_TOKENS)
    positive_name, negative_name = _CLASSES.get(label, ("positive", "negative"))
    positive = ~value if label in _CLASSES else value
    n_layers, n_positions = data.sizes["layer"], data.sizes["position"]
    n_cells = (n_layers + 1) * n_positions
    shared = {
        "C": C,
        "cv": cv,
        "groups": _groups(data, groups),
        "index": _sample_names(data),
        "mask": mask,
        "keep": keep,
        "scale": scale,
        "solver": solver,
        "tol": tol,
        "seed": seed,
        "compat": compat,
    }
    grid = fit_probes(
        data[site],
        positive,
        shuffles=shuffles,
        progress=progress and (lambda done, _: progress(done, n_cells)),
        **shared,
    )
    control = fit_probes(
        data["embed"],
        positive,
        shuffles=0,
        progress=progress and (lambda done, _: progress(n_layers * n_positions + done, n_cells)),
        **shared,
    )
    for name in ("auc", "auc_lo", "auc_hi"):
        grid[f"token_{name}"] = control[name].isel(layer=0, drop=True)
    grid.attrs["token_converged"] = bool(control.converged.where(control.auc.notnull(), True).all())
    grid[f"n_{positive_name}"], grid[f"n_{negative_name}"] = grid.n_positive, grid.n_negative
    for name, members in ((positive_name, labelled & positive), (negative_name, labelled & ~positive)):
        _add_shares(grid, name, members, data.exact_answer_valid.values.astype(bool), mask, compat)
    grid.attrs |= {
        "model": str(data.attrs.get("model", "")),
        "task": str(data.attrs.get("task", "")),
        "site": site,
        "label": label,
        "positive_class": positive_name if label in _CLASSES else f"{label} is true",
        "groups": "none: one random split" if compat else groups or "question",
        "n_samples": int(data.sizes["sample"]),
        "n_unlabelled": int((~labelled).sum()),
        "capture": path,
        "identity": _identity(data.attrs),
        "hiddenlake": version("hiddenlake"),
    }
    _note_best(grid)
    return grid


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


def cross_selected_auc(grid: xr.Dataset) -> float:
    """Mean over folds of the AUC in the cell that the other folds chose: the best cell without its own luck.

    NaN with fewer than two folds, or when no cell was fitted.
    """
    auc = grid.fold_auc.isel(label_set=0).transpose("fold", ...).values.reshape(grid.sizes["fold"], -1)
    auc = auc[:, np.isfinite(auc).all(axis=0)]
    if len(auc) < 2 or not auc.shape[1]:
        return float("nan")
    others = auc.sum(axis=0) - auc
    return float(np.mean([fold[chosen] for fold, chosen in zip(auc, others.argmax(axis=1), strict=True)]))


def _note_best(grid: xr.Dataset) -> None:
    n_cells = int(grid.auc.notnull().sum())
    grid.attrs["n_cells"] = n_cells
    if n_cells == 0:
        grid.attrs["note"] = "no cell was fitted: see `reason`"
        return
    best = best_cell(grid)
    selected = cross_selected_auc(grid)
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
    if np.isfinite(selected):
        grid.attrs["cross_selected_auc"] = selected
        note += f"; chosen on the other folds, the AUC is {selected:.3f}"
    if "shuffled_auc" in grid:
        grid["q"] = false_discovery_rate(grid)
        grid.attrs |= {"max_shuffled_auc": float(grid.shuffled_auc.max()), "max_t_p": max_t(grid)}
        note += (
            f"; with shuffled labels the best cell has {grid.attrs['max_shuffled_auc']:.3f}, and p is "
            f"{grid.attrs['max_t_p']:.2g} (max-T, {grid.sizes['label_set'] - 1} shuffles)"
        )
    grid.attrs["note"] = note + "."


def _add_shares(
    grid: xr.Dataset, name: str, members: np.ndarray, valid: np.ndarray, mask: np.ndarray, compat: str | None
) -> None:
    count = grid[f"n_{name}"].values
    with np.errstate(invalid="ignore", divide="ignore"):
        if compat is None:
            inside = mask & members
            share = (inside & valid).sum(axis=1) / inside.sum(axis=1)
        else:  # rows without a valid exact answer were dropped
            share = np.where(count[0] > 0, 1.0, np.nan)
        kept = count / members.sum()
    grid[f"valid_share_{name}"] = ("layer", "position"), np.broadcast_to(share, count.shape).copy()
    grid[f"kept_share_{name}"] = ("layer", "position"), kept


def _open(capture: Any) -> tuple[xr.Dataset, str]:
    if isinstance(capture, xr.Dataset):
        return capture, str(capture.attrs.get("capture", ""))
    if isinstance(capture, (str, Path)):
        capture = open_capture(capture)
    return capture.dataset(), str(capture.path)


def _identity(attrs: dict[str, Any]) -> str:
    """Digest of the value identity, whose nested names a Dataset's attributes join by dots."""
    identity: dict[str, Any] = {}
    for name, value in attrs.items():
        *outer, last = name.split(".")
        at = identity
        for part in outer:
            at = at.setdefault(part, {})
        at[last] = value
    identity.pop("capture", None)
    return digest(identity)


def _site(data: xr.Dataset, name: str) -> str:
    layer, site = parse_site(name)
    there = sorted(str(v) for v in data.data_vars if {"layer", "position", "sample"} <= set(data[v].dims))
    if site not in there:
        raise UnknownNameError(f"the capture has no site {site!r}: it has {', '.join(there) or 'none with layers'}")
    if layer is not None:
        raise UnknownNameError(f"{name!r} names one layer, a grid has many: say site={site!r} and layers=[{layer}]")
    return site


def _select(data: xr.Dataset, layers: list[int] | None, positions: list[str] | None) -> xr.Dataset:
    for dim, wanted in (("layer", layers), ("position", positions)):
        if wanted is None:
            continue
        there = data[dim].values.tolist()
        wanted = [str(one) if dim == "position" else one for one in wanted]
        missing = [one for one in wanted if one not in there]
        if missing or not wanted:
            raise UnknownNameError(f"the capture has no {dim} {missing or '(none named)'}: it has {there}")
        data = data.isel({dim: [there.index(one) for one in wanted]})
    return data


def _columns(data: xr.Dataset) -> list[str]:
    return sorted(str(name) for name in data.variables if data[name].dims == ("sample",) and name != "sample")


def _label(data: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(value, whether there is one), each (sample,) bool."""
    if name not in _columns(data):
        raise UnknownNameError(f"no column {name!r}: the samples have {', '.join(_columns(data))}")
    values = data[name].values
    if values.dtype == bool:
        return values, np.ones(len(values), bool)
    there = np.array([value is not None and value == value for value in values.tolist()], bool)
    found = set(values[there].tolist())
    if not found <= {0, 1}:
        raise ProbeError(
            f"label {name!r} has the values {sorted(map(str, found))[:5]}: expected true and false, or 1 and 0"
        )
    return np.array([bool(ok and value) for value, ok in zip(values.tolist(), there, strict=True)], bool), there


def _groups(data: xr.Dataset, name: str | None) -> np.ndarray:
    question = np.array([f"question {i}" for i in data["index"].values.tolist()], object)
    if name is None:
        return question.astype(str)
    if name == "gold":
        values = [answers[0] if len(answers) else "" for answers in data["answers"].values]
    elif name in _columns(data):
        values = data[name].values.tolist()
    else:
        raise UnknownNameError(f"no column {name!r}: groups are `gold`, None, or one of {', '.join(_columns(data))}")
    named = [str(value) if value is not None and value == value and str(value) else "" for value in values]
    return np.array([value or own for value, own in zip(named, question, strict=True)], str)


def _sample_names(data: xr.Dataset) -> np.ndarray:
    """Task index and sample index: the same in every capture of one run."""
    pairs = zip(data["index"].values.tolist(), data["sample_index"].values.tolist(), strict=True)
    return np.array([f"{index}/{sample}" for index, sample in pairs])
