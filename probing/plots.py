"""Plots: a grid as a layer x token heatmap, and a grid beside a published one."""

import textwrap
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.positions import PAPER
from hiddenlake.probing.grid import BestCell, at_one_C, best_cell, controls_at
from hiddenlake.probing.reference import compare_to_csv

SUFFIXES = (".svg", ".pdf", ".png")

_DPI = 200  # of PNG: a cell of a 32 x 15 grid is some 60 x 25 pixels
_CAPTION_SIZE = 7.5
_CHARACTERS_PER_INCH = 19.5  # of the caption's font at that size, measured
_INK = "#1a1a1a"
_MUTED = "#9a9a9a"


def draw_heatmap(grid: xr.Dataset, path: str | Path, metric: str = "auc") -> Path:
    """Draw a grid: layers down, tokens across, blue from 0.5 (other metrics than AUC: 0) to 1.

    grid : from fit_grid or open_grid. Of several C, that of the best cell is drawn.
    path : its suffix says the format: .svg, .pdf or .png.
    metric : a variable over (layer, position), e.g. auc, shuffled_auc, accuracy.

    The best cell is boxed, cells without probes are hatched, and the caption says what was fitted.

    Returns the path. Raises UnknownNameError for a metric or suffix that does not exist, ProbeError when
    nothing was fitted.
    """
    path = _picture(path)
    best = best_cell(grid)
    grid = at_one_C(grid)
    there = sorted(
        str(v) for v in grid.data_vars if grid[v].dims == ("layer", "position") and grid[v].dtype.kind == "f"
    )
    if metric not in there:
        raise UnknownNameError(f"the grid has no metric {metric!r}: it has {', '.join(there)}")
    values = in_column_order(grid[metric])
    is_auc = metric.endswith("auc")
    figure, axes = _figure(values.shape, 1)
    _panel(axes[0], values, cmap="Blues", low=0.5 if is_auc else 0.0, high=1.0, bar=_metric_name(metric))
    axes[0].set_title(_title(grid), fontsize=10, color=_INK, loc="left", pad=18)
    if metric == "auc":
        _mark(axes[0], values, best)
    _caption(figure, axes, _facts(grid, best, values, metric))
    return _save(figure, path)


def draw_comparison(grid: xr.Dataset, reference_csv: str | Path, path: str | Path) -> Path:
    """Draw a grid, a published one and their difference side by side, aligned by layer number and position.

    reference_csv : first column `layer`, the others positions.  path : .svg, .pdf or .png.

    Cells that only one of them has are hatched in the other and in the difference. Returns the path.
    Raises BadInputError for a CSV that is no grid, UnknownNameError for another suffix.
    """
    path = _picture(path)
    both = compare_to_csv(grid, reference_csv)
    ours, published, difference = (in_column_order(both[v]) for v in ("auc", "reference", "difference"))
    shared = np.isfinite(difference.values)
    if not shared.any():
        raise BadInputError(f"{reference_csv} and the grid share no cell: expected layers and positions of both")
    figure, axes = _figure(ours.shape, 3)
    _panel(axes[0], ours, cmap="Blues", low=0.5, high=1.0, bar="AUC")
    _panel(axes[1], published, cmap="Blues", low=0.5, high=1.0, bar="AUC")
    reach = max(0.05, float(np.ceil(20 * np.abs(difference.values[shared]).max()) / 20))
    _panel(axes[2], difference, cmap="RdBu_r", low=-reach, high=reach, bar="difference of AUC")
    titles = (_title(grid), f"published: {both.attrs['reference']}", "difference (the first minus the second)")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9, color=_INK, loc="left")
    n_ours, n_published = (int(np.isfinite(v.values).any(axis=1).sum()) for v in (ours, published))
    gap = difference.values[shared]
    words = [
        f"{int(shared.sum())} cells are in both: mean difference {gap.mean():+.3f}, mean absolute difference "
        f"{np.abs(gap).mean():.3f}, correlation {_correlation(ours.values[shared], published.values[shared])}.",
        "Layers are aligned by their number.",
    ]
    if n_ours != n_published:
        words.append(
            f"The models differ in depth: {n_ours} layers here, {n_published} published, so that one number is not "
            f"one relative depth."
        )
    words.append("Hatched: in one of the two only, or without probes. White: 0.5 or less.")
    _caption(figure, axes, " ".join(words))
    return _save(figure, path)


def _figure(shape: tuple[int, int], n_panels: int) -> tuple[Figure, list[Axes]]:
    """Panels of about the published size (6.4 x 4.8 inches), growing with the grid."""
    height = min(max(2.2, 0.155 * shape[0] + 0.4), 14.0)
    width = min(max(4.6, 0.36 * shape[1] + 1.0), 16.0)
    figure = Figure(figsize=(n_panels * width, height + 1.6), facecolor="white")
    FigureCanvasAgg(figure)
    axes = []
    for panel in range(n_panels):
        left = (panel + 0.09) / n_panels
        axes.append(figure.add_axes((left, 1.6 / (height + 1.6), 0.80 / n_panels, height / (height + 1.6) - 0.06)))
    return figure, axes


def _panel(ax: Axes, values: xr.DataArray, *, cmap: str, low: float, high: float, bar: str) -> None:
    shown = np.ma.masked_invalid(values.values)
    image = ax.imshow(shown, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest", origin="upper")
    for row, column in np.argwhere(np.ma.getmaskarray(shown)):
        cell = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(cell, 1, 1, facecolor="#f7f7f7", edgecolor=_MUTED, hatch="////", linewidth=0))
    layers, positions = values.layer.values, values.position.values
    every = 2 if len(layers) > 12 else 1
    ax.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    ax.set_xticks(range(len(positions)), positions, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=2.5, color=_MUTED)
    ax.set_xlabel("Token", fontsize=9)
    ax.set_ylabel("Layer", fontsize=9)
    for spine in ax.spines.values():
        spine.set_color(_MUTED)
        spine.set_linewidth(0.6)
    finite = values.values[np.isfinite(values.values)]
    beneath = bool(len(finite) and finite.min() < low)
    colours = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05, extend="min" if beneath else "neither")
    colours.set_label(bar, fontsize=8)
    colours.ax.tick_params(labelsize=7, length=2.5, color=_MUTED)
    colours.outline.set_linewidth(0.4)


def _mark(ax: Axes, values: xr.DataArray, best: BestCell) -> None:
    row = values.layer.values.tolist().index(best.layer)
    column = values.position.values.tolist().index(best.position)
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6, zorder=4))
    # Above the map: a label beside the box would hide its neighbours.
    ax.annotate(
        f"box: layer {best.layer}, {best.position}: {best.auc:.3f} ({best.auc_lo:.3f} to {best.auc_hi:.3f})",
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8,
        color=_INK,
    )


def _caption(figure: Figure, axes: list[Axes], words: str) -> None:
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer).transformed(figure.transFigure.inverted()) for ax in axes]
    left, bottom = min(box.x0 for box in boxes), min(box.y0 for box in boxes)
    width = (0.97 - left) * figure.get_figwidth() * _CHARACTERS_PER_INCH
    figure.text(
        left,
        bottom - 0.12 / figure.get_figheight(),
        "\n".join(textwrap.wrap(words, int(width))),
        fontsize=_CAPTION_SIZE,
        color="#444444",
        va="top",
        ha="left",
        linespacing=1.35,
    )


_CONTROLS = {
    "token_auc": "token identity alone (embed)",
    "random_auc": "a random vector for each token",
    "place_auc": "place and lengths alone",
    "control_task_auc": "random labels by token",
}


def _facts(grid: xr.Dataset, best: BestCell, values: xr.DataArray, metric: str) -> str:
    attrs = grid.attrs
    fitted = grid.auc.notnull()
    here = grid.sel(layer=best.layer, position=best.position)
    negative, positive = ("correct", "wrong") if "n_wrong" in grid else ("negative", "positive")
    scored = f"{int(here.n_validation)} validation samples" if "n_validation" in grid else f"n {int(here.n)}"
    words = [
        f"Label: {attrs.get('label', 'given')}; AUC of finding the {positive} samples. "
        f"n {_range(grid.n.where(fitted))} a cell ({negative} {_range(grid[f'n_{negative}'].where(fitted))}, "
        f"{positive} {_range(grid[f'n_{positive}'].where(fitted))}).",
        _split(grid),
        f"Best of {int(fitted.sum())} cells, and so biased upwards: layer {best.layer}, {best.position}, AUC "
        f"{best.auc:.3f} (95\u00a0% {best.auc_lo:.3f} to {best.auc_hi:.3f}, {scored}).",
    ]
    if "nested_auc" in attrs:
        words.append(
            f"Chosen on inner folds: {attrs['nested_auc']:.3f} (95\u00a0% {attrs['nested_auc_lo']:.3f} to "
            f"{attrs['nested_auc_hi']:.3f})."
        )
    if controls := [
        f"{_CONTROLS[name]} {auc:.3f}" for name, auc in controls_at(grid, best.layer, best.position).items()
    ]:
        words.append(f"At that token: {', '.join(controls)}.")
    if "shuffled_auc" in grid:
        shuffled = grid.shuffled_auc
        words.append(f"Shuffled labels: mean {float(shuffled.mean()):.3f}, largest {float(shuffled.max()):.3f}.")
    gap = float(grid.relative_gap.max())
    left = int(fitted.sum()) - int(grid.converged.sum())
    words.append(
        f"Certificate: every probe's objective is within {gap:.1e} of its optimum, as a share of it."
        if left == 0
        else f"Certificate: {left} of {int(fitted.sum())} cells have a probe that has not converged; its objective "
        f"may exceed the optimum by up to {gap:.1e} times itself."
    )
    if absent := int((~fitted).sum()):
        words.append(f"Hatched: {absent} cells with too few samples.")
    if metric.endswith("auc") and (values < 0.5).any():
        words.append("White: 0.5 or less.")
    return " ".join(words)


def _split(grid: xr.Dataset) -> str:
    attrs = grid.attrs
    if attrs.get("compat", "none") != "none":
        return (
            f"Fitted as in the paper's code (compat {attrs['compat']}): one split of 80\u00a0% and 20\u00a0%, "
            f"seed {attrs['seed']}; raw activations, C = 1, at most 100 iterations; {attrs['fallback']}."
        )
    return (
        f"{attrs['cv']}-fold cross-validation, groups: {attrs.get('groups', 'given')} ({attrs['n_groups']}); "
        f"C = {float(grid.C):g}, scale {attrs['scale']}."
    )


def in_column_order(values: xr.DataArray) -> xr.DataArray:
    """The paper's columns in the paper's order, then the others in their own."""
    positions = [str(p) for p in values.position.values]
    ordered = sorted(positions, key=lambda p: PAPER.index(p) if p in PAPER else len(PAPER))
    return values.transpose("layer", "position").sel(position=ordered)


def _title(grid: xr.Dataset) -> str:
    model, rest = grid.attrs.get("model", ""), [grid.attrs.get("task", ""), grid.attrs.get("site", "")]
    second = " · ".join(part for part in rest if part)
    return "\n".join(line for line in (model, second) if line)


def _metric_name(metric: str) -> str:
    return {"auc": "AUC"}.get(metric, metric.replace("_", " ").replace("auc", "AUC"))


def _range(values: xr.DataArray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    return f"{np.corrcoef(a, b)[0, 1]:.2f}" if len(a) > 2 and a.std() > 0 and b.std() > 0 else "undefined"


def _picture(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UnknownNameError(f"cannot draw {path.name!r}: the suffix says the format, expected {', '.join(SUFFIXES)}")
    return path


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12, dpi=_DPI)
    return path
