"""Figures: the page's pictures as Plotly's figures, whose colours follow the page."""

import html
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hiddenlake.probing.grid import at_one_C, best_cell
from hiddenlake.probing.plots import in_column_order
from hiddenlake.probing.report.facts import control_names, control_title
from hiddenlake.probing.report.scores import Reliability, Roc, Spread
from hiddenlake.probing.saving import classes

# Each has a contrast of at least 3 to 1 with the page, light and dark.
_COLOURS = ("#2f7fc8", "#cf6a12", "#2f9468", "#9365d0", "#d2454f", "#8a7416")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_GREY = "#808080"
_CHANCE = {"color": _GREY, "width": 1, "dash": "dot"}
_SHOWN = 4  # curves that are drawn at once; the others wait in the legend


@dataclass(frozen=True, slots=True)
class Figure:
    """plot : what Plotly draws.  alt : what it shows, in a sentence.  height : in pixels."""

    plot: go.Figure
    alt: str
    height: int

    def to_json(self) -> dict[str, Any]:
        """Numbers as JSON has them; what is not finite is null."""
        return json.loads(self.plot.to_json())


def heatmap(grid: xr.Dataset) -> Figure:
    """AUC by layer and token: what draw_heatmap draws, with every cell's numbers under the pointer."""
    best, at = best_cell(grid), at_one_C(grid)
    values = in_column_order(at.auc)
    at = at.sel(position=values.position)
    text = _cell_texts(at, grid)
    positions, layers = values.position.values.tolist(), [str(layer) for layer in values.layer.values]
    plot = _plot("token", "layer")
    plot.add_heatmap(
        x=positions, y=layers, z=_numbers(values.values), zmin=0.5, zmax=1.0, colorscale="Blues", text=text,
        hovertemplate="%{text}<extra></extra>", hoverongaps=True, xgap=1, ygap=1,
        colorbar={"title": {"text": "AUC", "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 0.9},
    )  # fmt: skip
    column, row = positions.index(best.position), layers.index(str(best.layer))
    box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    plot.add_shape(type="rect", **box, line={"color": _COLOURS[1], "width": 2})
    plot.update_xaxes(type="category", tickangle=-45)
    plot.update_yaxes(type="category", autorange="reversed", dtick=2 if len(layers) > 12 else 1)
    alt = (
        f"Heatmap of AUC, {len(layers)} layers by {len(positions)} tokens. The best cell is layer {best.layer}, "
        f"{best.position}, with {best.auc:.3f}. The table below has every number."
    )
    return Figure(plot, alt, 130 + max(14 * len(layers), 160))


def _cell_texts(at: xr.Dataset, grid: xr.Dataset) -> list[list[str]]:
    """What is said of each cell under the pointer; a list a layer. at : the grid at one C, in the columns' order."""
    positive, negative = classes(grid)
    controls = [f"{name}_auc" for name in control_names(grid)]
    extra = [*controls, *(["q"] if "q" in at else [])]
    names = ["auc", "auc_lo", "auc_hi", "n", f"n_{positive}", f"n_{negative}", "reason", *extra]
    values = [at[name].broadcast_like(at.auc).transpose("layer", "position").values.tolist() for name in names]
    titles = [*map(control_title, control_names(grid)), "false discovery rate"]

    def text(layer: int, position: str, cell: tuple[Any, ...]) -> str:
        auc, low, high, n, n_positive, n_negative, reason, *rest = cell
        counts = f"n {n}: {n_positive} {positive}, {n_negative} {negative}"
        if not np.isfinite(auc):
            return _safe(f"layer {layer}, {position}: no probe: {reason}") + f"<br>{counts}"
        lines = [f"AUC {auc:.3f}, 95 % {low:.3f} to {high:.3f}", counts]
        lines += [f"{title}: {value:.3g}" for title, value in zip(titles, rest, strict=False) if np.isfinite(value)]
        return "<br>".join([f"<b>{_safe(f'layer {layer}, {position}')}</b>", *map(_safe, lines)])

    rows = zip(at.layer.values.tolist(), *values, strict=True)
    return [
        [text(layer, position, cell) for position, *cell in zip(at.position.values.tolist(), *row, strict=True)]
        for layer, *row in rows
    ]


def curves(grid: xr.Dataset) -> Figure:
    """AUC by layer, a curve a token with its interval, and the best token's controls."""
    best, at = best_cell(grid), at_one_C(grid)
    layers = at.layer.values.tolist()
    highest = at.auc.max("layer").dropna("position")
    drawn = highest.sortby(highest, ascending=False).position.values.tolist()
    plot = _plot("layer", "AUC")
    for number, position in enumerate(drawn):
        column = at.sel(position=position)
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        shown: Any = True if number < _SHOWN else "legendonly"
        low, high = _numbers(column.auc_lo.values), _numbers(column.auc_hi.values)
        both = {"legendgroup": position, "visible": shown}
        plot.add_scatter(
            x=layers + layers[::-1], y=high + low[::-1], fill="toself", fillcolor=_faint(colour), line={"width": 0},
            hoverinfo="skip", showlegend=False, mode="lines", **both,
        )  # fmt: skip
        hover = "layer %{x}<br>AUC %{y:.3f}, 95 % %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>n %{customdata[2]}"
        plot.add_scatter(
            x=layers, y=_numbers(column.auc.values), name=_safe(position), mode="lines", line={"color": colour, "dash": dash},
            customdata=[list(one) for one in zip(low, high, column.n.values.tolist(), strict=True)],
            hovertemplate=f"<b>{_safe(position)}</b><br>{hover}<extra></extra>", **both,
        )  # fmt: skip
    there = at.sel(position=best.position)
    for number, name in enumerate(control_names(grid)):
        values = there[f"{name}_auc"].broadcast_like(there.auc).transpose("layer").values
        plot.add_scatter(
            x=layers, y=_numbers(values), name=_safe(f"{best.position}: {control_title(name)}"),
            mode="lines", line={"color": _GREY, "width": 1.5, "dash": _DASHES[1 + number % 5]}, hoverinfo="y+name",
        )  # fmt: skip
    plot.add_hline(y=0.5, line=_CHANCE)
    plot.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    alt = (
        f"AUC by layer for {len(drawn)} tokens, with 95 % bands, of which the {min(_SHOWN, len(drawn))} with the highest "
        f"AUC are drawn at first; grey: the controls at {best.position}. The table of all cells has every number."
    )
    return Figure(plot, alt, 560)


def roc_figure(whole: Roc, folds: list[Roc], names: tuple[str, str]) -> Figure:
    """The ROC curve of all held-out probabilities, over those of the folds."""
    plot = _plot(f"{names[1]} samples called {names[0]}", f"{names[0]} samples found")
    plot.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=_CHANCE, hoverinfo="skip", showlegend=False)
    for number, one in enumerate(folds):
        plot.add_scatter(
            x=_numbers(one.false), y=_numbers(one.true), mode="lines", line={"color": _GREY, "width": 1}, opacity=0.6,
            hoverinfo="skip", name="each fold", legendgroup="fold", showlegend=number == 0,
        )  # fmt: skip
    hover = f"probability from %{{customdata:.3f}}<br>{names[0]} found %{{y:.3f}}<br>{names[1]} called {names[0]} %{{x:.3f}}"
    plot.add_scatter(
        x=_numbers(whole.false), y=_numbers(whole.true), mode="lines", line={"color": _COLOURS[0], "width": 2.5},
        name="all folds together", customdata=_numbers(whole.threshold), hovertemplate=f"{hover}<extra></extra>",
    )  # fmt: skip
    _unit(plot)
    return Figure(plot, f"ROC curve of the best cell's held-out probabilities, and of each of {len(folds)} folds.", 420)


def reliability_figure(found: Reliability, positive: str) -> Figure:
    """Share of positives in bins of equal size, by their mean probability."""
    plot = _plot(f"probability of {positive}", f"share that is {positive}")
    plot.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=_CHANCE, hoverinfo="skip", showlegend=False)
    text = [
        f"mean probability {m:.3f}<br>share {s:.3f}, 95 % {low:.3f} to {high:.3f}<br>n {n}"
        for m, s, low, high, n in zip(found.mean, found.share, found.lo, found.hi, found.n, strict=True)
    ]
    error = {
        "array": _numbers(found.hi - found.share),
        "arrayminus": _numbers(found.share - found.lo),
        "thickness": 1.5,
    }
    plot.add_scatter(
        x=_numbers(found.mean), y=_numbers(found.share), mode="lines+markers", text=text, showlegend=False,
        hovertemplate="%{text}<extra></extra>", line={"color": _COLOURS[0]}, error_y=error | {"symmetric": False},
    )  # fmt: skip
    _unit(plot)
    alt = f"Reliability in {len(found.n)} bins of equally many samples, with 95 % intervals; ECE {found.error:.3f}."
    return Figure(plot, alt, 420)


def spread_figure(found: Spread, names: tuple[str, str]) -> Figure:
    """Histograms of the probabilities of each class, one over the other."""
    plot = _plot(f"probability of {names[0]}", "samples")
    middle = (found.edges[1:] + found.edges[:-1]) / 2
    for name, count, colour, side in zip(
        names, (found.positive, found.negative), (_COLOURS[1], _COLOURS[0]), (1, -1), strict=True
    ):
        text = [
            f"{n} {name} samples<br>probability {low:.2f} to {high:.2f}"
            for n, low, high in zip(count, found.edges[:-1], found.edges[1:], strict=True)
        ]
        plot.add_bar(
            x=_numbers(middle), y=_numbers(side * count), name=f"{name}, {'above' if side > 0 else 'below'}", marker={"color": colour},
            text=text, textposition="none", hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    most = int(max(found.positive.max(), found.negative.max(), 1))
    step = max(1, round(most / 3))
    ticks = [*range(-most // step * step, most + 1, step)]
    plot.update_yaxes(tickvals=ticks, ticktext=[str(abs(tick)) for tick in ticks])
    plot.update_layout(barmode="relative", bargap=0.05, legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    plot.update_xaxes(range=[0, 1])
    return Figure(plot, f"How many {names[0]} and {names[1]} samples have which probability of {names[0]}.", 420)


def _plot(x: str, y: str) -> go.Figure:
    plot = go.Figure(layout={"template": "none"})
    plot.update_layout(
        margin={"l": 55, "r": 15, "t": 10, "b": 60}, dragmode=False, hovermode="closest", paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    plot.update_xaxes(title={"text": x}, automargin=True, zeroline=False, fixedrange=True)
    plot.update_yaxes(title={"text": y}, automargin=True, zeroline=False, fixedrange=True)
    return plot


def _unit(plot: go.Figure) -> None:
    plot.update_xaxes(range=[-0.02, 1.02])
    plot.update_yaxes(range=[-0.02, 1.02])
    plot.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})


def _numbers(values: np.ndarray) -> list[Any]:
    """Lists, of which JSON has numbers: what is not finite is nothing. Six digits are more than a screen has."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _safe(text: str) -> str:
    """Plotly takes some tags in texts for its own."""
    return html.escape(str(text), quote=False)
