"""Part: everything that a page shows of one grid and the capture that it was fitted on."""

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import IdentityError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.grid import best_cell
from hiddenlake.probing.plots import draw_heatmap
from hiddenlake.probing.report import facts, figures
from hiddenlake.probing.report.again import fit_again
from hiddenlake.probing.report.examples import Example, most_wrong
from hiddenlake.probing.report.figures import Figure
from hiddenlake.probing.report.scores import Reliability, reliability, roc, spread
from hiddenlake.probing.saving import classes


@dataclass(frozen=True, slots=True)
class Cell:
    """What the held-out probabilities of the best cell show.

    scores : from held_out.  alarms, missed : negatives of the highest probability, positives of the lowest.
    """

    words: str
    scores: xr.Dataset
    roc: Figure
    reliability: Figure
    reliability_caption: str
    spread: Figure
    spread_caption: str
    bins: facts.Table
    alarms: list[Example]
    missed: list[Example]


@dataclass(frozen=True, slots=True)
class Part:
    """One grid's part of a page; the names are those of the template. cell : None where `no_cell` says why there is none."""

    id: str
    name: str
    positive: str
    negative: str
    headline: list[str]
    best: list[tuple[str, str]]
    heatmap: Figure
    heatmap_caption: str
    still: str
    aucs: facts.Table
    controls: facts.Table
    shuffles: str
    curves: Figure
    positions: facts.Table
    certificate: str
    settings: list[tuple[str, str]]
    cell: Cell | None
    no_cell: str


def make_part(capture: Capture, grid: xr.Dataset, number: int) -> Part:
    """Raises IdentityError for a grid of another capture, ProbeError where nothing was fitted, or where the labels have
    changed since."""
    check_grid(capture, grid)
    attrs, (positive, negative) = grid.attrs, classes(grid)
    compat = attrs.get("compat", "none")
    name = f"{attrs['site']}: {attrs['positive_class']} (label {attrs['label']}; groups: {attrs['groups']})"
    reason = f"With compat {compat} there is one validation set, and most samples have no held-out probability."
    return Part(
        id=f"grid-{number}",
        name=name,
        positive=positive,
        negative=negative,
        headline=facts.headline(grid),
        best=facts.best_facts(grid),
        heatmap=figures.heatmap(grid),
        heatmap_caption=_heatmap_caption(grid),
        still=_still(grid),
        aucs=facts.auc_table(grid),
        controls=facts.controls(grid),
        shuffles=facts.discoveries(grid),
        curves=figures.curves(grid),
        positions=facts.positions(grid),
        certificate=facts.certificate(grid),
        settings=facts.settings(grid),
        cell=_cell(capture, grid) if compat == "none" else None,
        no_cell=reason if compat != "none" else "",
    )


def check_grid(capture: Capture, grid: xr.Dataset) -> None:
    """Raise IdentityError where a grid was not fitted on this capture as it is."""
    needed = ("identity", "site", "label", "groups", "n_samples", "n_cells")
    if missing := [name for name in needed if name not in grid.attrs]:
        raise IdentityError(f"the grid does not say its {', '.join(missing)}: give one that fit_grid made of a capture")
    site, found = grid.attrs["site"], digest(capture.identity)
    if grid.attrs["identity"] != found:
        raise IdentityError(
            f"the grid of {site} was fitted on a capture of another identity ({grid.attrs['identity']}, and {capture.path} "
            f"has {found}): give a grid of this capture, or fit one"
        )
    if grid.attrs["n_samples"] != len(capture):
        raise IdentityError(
            f"the grid of {site} was fitted on {grid.attrs['n_samples']} samples, and {capture.path} holds {len(capture)}: "
            f"fit it again"
        )
    best_cell(grid)


def _cell(capture: Capture, grid: xr.Dataset) -> Cell:
    best, attrs, names = best_cell(grid), grid.attrs, classes(grid)
    found = fit_again(capture, grid, best.layer, best.position, best.C)
    inside = np.flatnonzero(np.isfinite(found.probability.values))
    probability, positive = found.probability.values[inside], found.positive.values[inside]
    fold = found.fold.values[inside]
    bins = reliability(probability, positive)
    alarms, missed = most_wrong(capture.dataset(), found, names)
    folds = [roc(probability[fold == f], positive[fold == f]) for f in np.unique(fold)]
    words = (
        f"Layer {best.layer}, {best.position}: each of {len(inside)} samples is scored once, by the probe of the other "
        f"{int(attrs['cv']) - 1} folds. Mean of the folds' AUCs {found.attrs['auc']:.3f}, from "
        f"{float(found.fold_auc.min()):.3f} to {float(found.fold_auc.max()):.3f}."
    )
    return Cell(
        words=words,
        scores=found,
        roc=figures.roc_figure(roc(probability, positive), folds, names),
        reliability=figures.reliability_figure(bins, names[0]),
        reliability_caption=f"Calibration: ECE {bins.error:.3f}. On the dotted line probabilities are what they say.",
        spread=figures.spread_figure(spread(probability, positive), names),
        spread_caption=f"Probabilities of {names[0]} samples above the line, of {names[1]} ones below it.",
        bins=_bins(bins, names[0]),
        alarms=alarms,
        missed=missed,
    )


def _bins(found: Reliability, positive: str) -> facts.Table:
    rows = tuple(
        (f"{mean:.3f}", facts.with_interval(share, low, high), str(n))
        for mean, share, low, high, n in zip(found.mean, found.share, found.lo, found.hi, found.n, strict=True)
    )
    return facts.Table("Bins of equally many samples", ("mean probability", f"share that is {positive}", "n"), rows)


def _heatmap_caption(grid: xr.Dataset) -> str:
    absent = int(grid.auc.isnull().all("C").sum())
    words = "The box is the best cell. Below 0.5 the colour is that of 0.5."
    return words + (
        f" Without colour: {absent} cells that have no probe; the table of tokens says why." if absent else ""
    )


def _still(grid: xr.Dataset) -> str:
    """The heatmap as a picture, for a reader without scripts."""
    with tempfile.TemporaryDirectory() as folder:
        picture = draw_heatmap(grid, Path(folder) / "heatmap.png").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
