"""Facts: what a page says of one grid, in words and tables."""

import ast
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.probing.experiments.heatmap import by_position
from hiddenlake.probing.grid import BestCell, at_one_C, best_cell
from hiddenlake.probing.saving import classes

# What a control is that a grid has as `<name>_auc`: in a word, and in some.
CONTROLS = {
    "token": ("token alone", "the same probe on the token's embedding"),
    "random": ("random vector", "the same probe on a random vector for each token"),
    "place": ("place alone", "the same probe on where the token stands, and how long prompt and answer are"),
    "control_task": ("control task", "the same probe, of labels that are a function of the token alone"),
    "shuffled": ("shuffled labels", "mean of all shuffles"),
}
# Attributes that stand elsewhere on the page, or say where a file lay.
_ELSEWHERE = (
    "best_", "model", "task", "capture", "identity", "note", "n_cells", "n_samples", "max_", "nested_",
)  # fmt: skip
_DISCOVERY = 0.05  # the share of false discoveries among the cells that are counted


@dataclass(frozen=True, slots=True)
class Table:
    """caption, head : text.  rows : of as many texts as the head has; the first names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def at_cell(grid: xr.Dataset, best: BestCell) -> xr.Dataset:
    """The grid at one cell, without the axes layer, position and C."""
    return grid.sel(layer=best.layer, position=best.position, C=best.C)


def with_interval(auc: float, low: float, high: float) -> str:
    """`0.905 (95 % 0.884 to 0.925)`."""
    return f"{auc:.3f} (95\u00a0% {low:.3f} to {high:.3f})"


def control_names(grid: xr.Dataset) -> list[str]:
    """The controls of a grid, by the name before `_auc`: of each cell, or of each token."""
    there = [str(name).removesuffix("_auc") for name in grid.data_vars if str(name).endswith("_auc")]
    found = [name for name in there if {"position", "C"} <= set(grid[f"{name}_auc"].dims) <= {"layer", "position", "C"}]
    return sorted(found, key=lambda name: (list(CONTROLS).index(name) if name in CONTROLS else len(CONTROLS), name))


def control_title(name: str) -> str:
    """In a word."""
    return CONTROLS[name][0] if name in CONTROLS else name.replace("_", " ")


def arguments(grid: xr.Dataset) -> dict[str, Any]:
    """What fit_grid was called with, of what held_out takes too, but for C."""
    attrs = grid.attrs
    weight = attrs.get("class_weight", "none")
    given = {"label": attrs["label"], "groups": None if attrs["groups"] == "question" else attrs["groups"]}
    given |= {"cv": int(attrs["cv"]), "scale": attrs["scale"], "solver": attrs["solver"], "tol": float(attrs["tol"])}
    given["seed"] = int(attrs["seed"])
    if l1_ratio := float(attrs.get("l1_ratio", 0.0)):
        given |= {"penalty": "l1"} if l1_ratio == 1.0 else {"penalty": "elasticnet", "l1_ratio": l1_ratio}
    if weight != "none":
        given["class_weight"] = weight if weight == "balanced" else ast.literal_eval(weight)
    return given


def headline(grid: xr.Dataset) -> list[str]:
    """What was found, in sentences: the best cell, what choosing it is worth, and what its token alone gives away."""
    best, attrs = best_cell(grid), grid.attrs
    here = at_cell(grid, best)
    positive, negative = classes(grid)
    counts = f"{int(here[f'n_{positive}'])} {positive} and {int(here[f'n_{negative}'])} {negative}"
    scored = f"{int(here.n_validation)} validation samples of {int(here.n)}" if "n_validation" in grid else int(here.n)
    words = [
        f"At layer {best.layer} and the token {best.position}, a linear probe of {attrs['site']} tells {positive} from "
        f"{negative} samples with AUC {with_interval(best.auc, best.auc_lo, best.auc_hi)}, n\u00a0{scored}: {counts}."
    ]
    unlucky = unbiased(grid)
    biased = f"That is the best of {attrs['n_cells']} cells, so it is biased upwards"
    words.append(f"{biased}; {unlucky}." if unlucky else f"{biased}, and its interval does not count the choice.")
    if "token_auc" in grid:
        alone = with_interval(float(here.token_auc), float(here.token_auc_lo), float(here.token_auc_hi))
        words.append(f"The token alone, its embedding before any layer, gives {alone}.")
    words.append(significance(grid))
    return words


def unbiased(grid: xr.Dataset) -> str:
    """What the best cell is worth without its own luck, or nothing where that is not known."""
    if not np.isfinite(grid.attrs.get("nested_auc", np.nan)):
        return ""
    auc = with_interval(*(grid.attrs[f"nested_{name}"] for name in ("auc", "auc_lo", "auc_hi")))
    return f"chosen on inner folds, the AUC on data that the choice never saw is {auc}"


def significance(grid: xr.Dataset) -> str:
    """The max-T p-value, and how small it could have been."""
    p, shuffles = grid.attrs.get("max_t_p", np.nan), int(grid.attrs.get("shuffles", 0))
    if not np.isfinite(p):
        return "No shuffled labels were fitted, so there is no p-value."
    least = 1 / (shuffles + 1)
    words = f"Against the best cells of {_count(shuffles)} of the labels, p\u00a0=\u00a0{p:.2g} (max-T)"
    return words + (f", the least that {_count(shuffles)} can give." if p <= least * 1.001 else ".")


def best_facts(grid: xr.Dataset) -> list[tuple[str, str]]:
    """(what, value) of the best cell beside its AUC."""
    best = best_cell(grid)
    here = at_cell(grid, best)
    positive, negative = classes(grid)
    facts = [("C, inverse strength of the penalty", f"{best.C:g}")]
    if "auc_certified_lo" in grid:
        low, high = float(here.auc_certified_lo), float(here.auc_certified_hi)
        facts.append(("AUC of the exact optimum lies between", f"{low:.4f} and {high:.4f}"))
    if "auprc" in grid:
        facts.append(("AUPRC; that of chance", f"{float(here.auprc):.3f}; {float(here.base_rate):.3f}"))
        accuracy = f"{float(here.accuracy):.3f}; {float(here.majority_accuracy):.3f}"
        facts.append(("accuracy; of naming the larger class always", accuracy))
        facts.append(("log-loss in nats; Brier; ECE", f"{float(here.log_loss):.3f}; {float(here.brier):.3f}; {float(here.ece):.3f}"))  # fmt: skip
    if unbiased(grid):
        chosen = zip(*(grid.attrs[f"nested_{name}"] for name in ("layers", "positions", "C")), strict=True)
        cells = "; ".join(f"layer {layer}, {position}, C {c:g}" for layer, position, c in chosen)
        facts.append(("chosen on inner folds, fold by fold", cells))
    for name in (positive, negative):
        if f"valid_share_{name}" in grid:
            share, kept = float(here[f"valid_share_{name}"]), float(here[f"kept_share_{name}"])
            text = f"{share:.3f}; {kept:.3f} of all {name} are in the cell"
            facts.append((f"share of {name} with a valid exact answer", text))
    return facts


def controls(grid: xr.Dataset) -> Table:
    """Each control at the best cell, what the best cell has more, and the control over all cells."""
    best = best_cell(grid)
    here, rows = at_cell(grid, best), []
    for name in control_names(grid):
        value, every = float(here[f"{name}_auc"]), grid[f"{name}_auc"].sel(C=best.C)
        bounds = [float(here[f"{name}_auc_{side}"]) for side in ("lo", "hi") if f"{name}_auc_{side}" in grid]
        text = with_interval(value, *bounds) if len(bounds) == 2 else f"{value:.3f}"
        over = f"{float(every.mean()):.3f}; {float(every.max()):.3f}"
        what = f"{control_title(name)}: {CONTROLS[name][1]}" if name in CONTROLS else control_title(name)
        rows.append((what, text, f"{best.auc - value:+.3f}", over))
    caption = f"Controls at layer {best.layer}, {best.position}, where the probe has AUC {best.auc:.3f}"
    return Table(
        caption, ("control", "AUC there", "probe minus control", "control in all cells: mean; largest"), tuple(rows)
    )


def discoveries(grid: xr.Dataset) -> str:
    """How many cells are above chance, or nothing where shuffles did not say."""
    if "q" not in grid or not bool(grid.q.notnull().any()):
        return ""
    found, there = int((grid.q <= _DISCOVERY).sum()), int(grid.q.notnull().sum())
    return (
        f"{found} of {there} cells are above chance at a false discovery rate of {_DISCOVERY:g} (Benjamini and Hochberg, "
        f"against all cells of all shuffles; the least q is {float(grid.q.min()):.2g})."
    )


def auc_table(grid: xr.Dataset) -> Table:
    """AUC and interval of every cell; a row a layer, a column a token."""
    best, at = best_cell(grid), at_one_C(grid)
    head = [f"{position}, n\u00a0{_range(at.n.sel(position=position))}" for position in at.position.values.tolist()]
    values = [at[name].transpose("layer", "position").values for name in ("auc", "auc_lo", "auc_hi")]
    rows = [
        (str(layer), *(f"{a:.3f} ({low:.3f} to {high:.3f})" if np.isfinite(a) else "none" for a, low, high in zip(*row, strict=True)))
        for layer, *row in zip(at.layer.values.tolist(), *values, strict=True)
    ]  # fmt: skip
    caption = f"AUC (95\u00a0% interval) by layer and token, C = {best.C:g}"
    return Table(caption, ("layer", *head), tuple(rows))


def positions(grid: xr.Dataset) -> Table:
    """What each token's cells rest on."""
    found = by_position(grid)
    columns = list(dict.fromkeys(name for row in found for name in row))
    rows = tuple(tuple(_three(row.get(name)) for name in columns) for row in found)
    caption = "Samples of each class (n), the share of them with a valid exact answer (valid), and the best layer"
    return Table(caption, tuple(columns), rows)


def _three(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else _text(value)


def certificate(grid: xr.Dataset) -> str:
    """How far the worst probe can be from its optimum."""
    gap, left, cells = float(grid.relative_gap.max()), grid.attrs.get("n_not_converged", 0), grid.attrs["n_cells"]
    probes = int(grid.fold_objective.notnull().sum())
    if left:
        return (
            f"{left} of {cells} cells have a probe that has not converged: an objective may exceed its optimum by up to "
            f"{gap:.1e} times itself."
        )
    return (
        f"Each of {probes} probes in {cells} cells has an objective within {gap:.1e} of its optimum, as a share of it."
    )


def settings(grid: xr.Dataset) -> list[tuple[str, str]]:
    """(name, value) of what was fitted, as the grid's attributes have it."""
    return [(name, _text(value)) for name, value in grid.attrs.items() if not name.startswith(_ELSEWHERE)]


def _range(values: xr.DataArray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _count(shuffles: int) -> str:
    return f"{shuffles} shuffle{'s' * (shuffles != 1)}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(map(_text, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
