"""Nested: cells chosen on some folds and scored on another, so that no choice is judged by what it was made on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.cells import Cells
from hiddenlake.probing.design import Design, make_design
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.grid import best_cell
from hiddenlake.probing.inference import nested_choice
from hiddenlake.probing.judge import judge
from hiddenlake.probing.metrics import auroc, bootstrap_interval, delong_interval
from hiddenlake.probing.selection import Selection
from hiddenlake.probing.solve import solve_cell, too_few
from hiddenlake.probing.sweep import Progress, sweep

# (layer, position)
At = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Settings:
    """How every probe of an experiment is fitted: see fit_probes."""

    C: float = 0.01
    cv: int = 5
    scale: str = "feature"
    solver: str = "auto"
    tol: float = 1e-6
    seed: int = 0


DEFAULT = Settings()


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What probes say of the samples that neither they nor the choice of their cell saw.

    score : (sample,) float64, log-odds of the positive class; NaN where the fold's cell does not have the sample.
    cells : of each fold.  relative_gap : the largest gap_bound / objective.  converged : whether all probes have.
    certified : mean over folds of the bounds between which the optimum's AUC lies.
    """

    score: np.ndarray
    cells: tuple[At, ...]
    relative_gap: float
    converged: bool
    certified: tuple[float, float]

    @property
    def named(self) -> str:
        """The cells in words, each once."""
        return ", ".join(f"{layer} {position}" for layer, position in dict.fromkeys(self.cells))


@dataclass(frozen=True, slots=True)
class FoldAuc:
    """Mean of the folds' AUCs with its 95 % interval, and what it rests on. `reason` says why there is none."""

    auc: float
    lo: float
    hi: float
    n_positive: int
    n_negative: int
    reason: str = ""


def design_of(chosen: Selection, settings: Settings) -> Design:
    """The folds of all samples that have a label. Raises ProbeError when they cannot be split."""
    return make_design(
        chosen.positive, kept=chosen.labelled, names=chosen.index, groups=chosen.groups, shuffles=0, **asdict(settings)
    )


def nested_grid(chosen: Selection, settings: Settings, progress: Progress | None = None) -> xr.Dataset:
    """All cells of a selection, cross-validated, and within the others of each fold once more: for `cells_of`."""
    return fit_probes(
        chosen.data[chosen.site], chosen.positive, groups=chosen.groups, index=chosen.index, mask=chosen.mask,
        keep=chosen.labelled, shuffles=0, nested=True, progress=progress, **asdict(settings),
    )  # fmt: skip


def cells_of(grid: xr.Dataset) -> list[At]:
    """Of each fold, the cell that the others choose. Raises ProbeError where no cell was fitted."""
    best_cell(grid)
    found = nested_choice(grid)
    return list(zip(found.layers, found.positions, strict=True))


def held_out_scores(
    chosen: Selection, design: Design, cells: Sequence[At], positive: np.ndarray | None = None
) -> HeldOut:
    """Score each fold by the probe of its cell that was fitted on the others.

    cells : one a fold.  positive : (sample,) bool, another label than the selection's.

    Raises ProbeError where a cell has too few samples of a class.
    """
    labels = (chosen.positive if positive is None else positive)[None]
    own = replace(design, labels=labels)
    score = np.full(len(chosen.positive), np.nan)
    gaps: list[float] = []
    bounds: list[np.ndarray] = []
    positions = chosen.data.position.values.astype(str).tolist()
    for layer, position in dict.fromkeys(cells):

        def fit(
            X: np.ndarray, rows: np.ndarray, _: int, at: At = (layer, position)
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            if reason := too_few(own.labels[0, rows], own.fold[rows], own.n_folds):
                raise ProbeError(f"layer {at[0]}, {at[1]}: {reason}")
            solved = solve_cell(X, rows, own)
            found = np.full(len(score), np.nan)
            judged = judge(solved, X)
            found[rows] = judged.score[:, 0]
            gap = np.full(own.n_folds, np.nan)
            gap[solved.mask] = solved.solution.gap_bound / solved.solution.objective
            return found, gap, np.stack([judged.certified_lo[:, 0], judged.certified_hi[:, 0]])

        number = positions.index(position)
        activations = chosen.data[chosen.site].sel(layer=[layer]).isel(position=[number])
        found, gap, certified = sweep(
            Cells(activations), chosen.mask[[number]], chosen.labelled, fit, order=own.order
        )[0, 0]  # fmt: skip
        for f in (f for f, cell in enumerate(cells) if cell == (layer, position)):
            score[own.fold == f] = found[own.fold == f]
            gaps.append(float(gap[f]))
            bounds.append(certified[:, f])
    lo, hi = np.mean(bounds, axis=0).tolist()
    return HeldOut(score, tuple(cells), max(gaps), max(gaps) <= design.tol, (lo, hi))


def fold_auc(score: np.ndarray, positive: np.ndarray, design: Design, trained: bool = True) -> FoldAuc:
    """How well scores rank the samples of each fold: scores of two folds may be of two probes, and are never compared.

    score : (sample,), higher for the positive class; samples that are NaN are left out.  positive : (sample,) bool.
    trained : whether the scores are of probes that were trained on the other folds, see `delong_interval`.

    The interval is DeLong's over folds, or the bootstrap of whole groups where groups repeat.
    """
    use = np.isfinite(score) & (design.fold >= 0)
    s, y, fold = score[use], positive[use], design.fold[use]
    counts = int(y.sum()), int((~y).sum())
    if reason := too_few(y, fold, design.n_folds):
        return FoldAuc(np.nan, np.nan, np.nan, *counts, reason)
    inside = fold[:, None] == np.arange(design.n_folds)
    measured = auroc(np.broadcast_to(s[:, None], inside.shape), np.broadcast_to(y[:, None], inside.shape), inside)
    lo, hi = delong_interval(measured.auc, measured.variance, trained)
    if design.group is not None:
        lo, hi = bootstrap_interval(s, y, fold, design.group[use], seed=design.seed, trained=trained)
    return FoldAuc(float(measured.auc.mean()), float(lo), float(hi), *counts)
