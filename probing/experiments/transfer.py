"""The paper's figure 3: probes that are trained on one task and tested on another, against the model's own confidence.

What differs from the paper: the cell is chosen on the training task (where both are one, on the folds that are not judged);
choose="target" takes the test task's best one, as the paper does, which is optimistic. An AUC below one half stays below
(compat="llmsknow": its distance to one half counts). Test samples whose prompt or group the training task has are dropped. The
baseline is the least log-probability of the exact answer's tokens, of the same samples; the paper's is of raw logits.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import BadInputError, IdentityError
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.design import Design
from hiddenlake.probing.experiments.baselines import confidence_of
from hiddenlake.probing.experiments.nested import (
    DEFAULT,
    At,
    FoldAuc,
    Settings,
    cells_of,
    design_of,
    fold_auc,
    held_out_scores,
    nested_grid,
)
from hiddenlake.probing.experiments.table import Table, interval
from hiddenlake.probing.grid import best_cell
from hiddenlake.probing.probe import Probe, different_fields, score_rows
from hiddenlake.probing.selection import Selection, select
from hiddenlake.probing.sweep import Progress
from hiddenlake.probing.train import fit_probe

BASELINE = "logprob min exact"


@dataclass(frozen=True, slots=True)
class Side:
    """One task, to be trained or tested on.

    best : its best cell by cross-validation of all samples.  nested : of each fold, the cell that the others choose.
    confident : (sample,) the baseline, NaN where there is no exact answer.
    """

    name: str
    capture: Capture
    data: xr.Dataset
    chosen: Selection
    design: Design
    best: At
    nested: list[At]
    confident: np.ndarray


def transfer(
    captures: Sequence[Capture],
    site: str,
    *,
    choose: str = "train",
    compat: str | None = None,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> Table:
    """Train on each task, test on each, at cells that all of them have.

    captures : of different tasks and the same model.  choose : `train`, or `target` for the test task's best cell.

    Raises IdentityError where their activations are of different models, BadInputError, ProbeError, UnknownNameError.
    """
    if choose not in ("train", "target"):
        raise BadInputError(f"choose is {choose!r}: expected `train` or `target`")
    _check(captures)
    sides = _sides(captures, site, settings, progress)
    probes: dict[tuple[str, At], Probe] = {}
    rows = []
    for train in sides:
        for test in sides:
            cells = [(test if choose == "target" else train).best] * settings.cv
            if train is test:
                if choose == "train":
                    cells = train.nested
                score, design, dropped = held_out_scores(train.chosen, train.design, cells).score, train.design, 0
            else:
                known = train.name, cells[0]
                if known not in probes:
                    probes[known] = fit_probe(train.data, train.chosen.site, *cells[0], **asdict(settings))
                score, design, dropped = _across(train, test, probes[known])
            rows.append(_row(train, test, score, design, cells, dropped, compat))
    facts = {
        "experiment": "transfer", "model": sides[0].data.attrs.get("model", ""), "site": sides[0].chosen.site,
        "tasks": [side.name for side in sides], "choose": choose, "compat": compat or "none", "baseline": BASELINE,
        "identities": [side.chosen.digest for side in sides], **asdict(settings),
    }  # fmt: skip
    return Table(rows, facts, _notes(choose, compat))


def _check(captures: Sequence[Capture]) -> None:
    if len(captures) < 2:
        raise BadInputError(f"{len(captures)} capture: expected two or more tasks to train and test on")
    for other in captures[1:]:
        if differs := different_fields(captures[0].identity, other.identity):
            raise IdentityError(
                f"{captures[0].path} and {other.path} hold activations of different identities: {', '.join(differs)} "
                f"differ: capture both from the same model"
            )


def _sides(captures: Sequence[Capture], site: str, settings: Settings, progress: Progress | None) -> list[Side]:
    every = [capture.dataset() for capture in captures]
    shared: dict[str, list[Any]] = {}
    for dim in ("layer", "position"):
        shared[dim] = [one for one in every[0][dim].values.tolist() if all(one in d[dim].values for d in every)]
        if not shared[dim]:
            raise BadInputError(f"the captures share no {dim}: capture them with the same ones")
    tasks = [str(data.attrs.get("task", "")) for data in every]
    if len(set(tasks)) < len(tasks):
        tasks = [str(capture.path) for capture in captures]
    sides = []
    n_cells = len(shared["layer"]) * len(shared["position"])
    for number, (name, capture, data) in enumerate(zip(tasks, captures, every, strict=True)):
        chosen = select(
            data, site, label="correct", groups="group", layers=shared["layer"], positions=shared["position"]
        )

        def told(done: int, _: int, before: int = number * n_cells) -> None:
            if progress is not None:
                progress(before + done, len(every) * n_cells)

        grid = nested_grid(chosen, settings, told)
        best = best_cell(grid)
        confident = confidence_of(data)[BASELINE]
        sides.append(
            Side(
                name,
                capture,
                data,
                chosen,
                design_of(chosen, settings),
                (best.layer, best.position),
                cells_of(grid),
                confident,
            )  # fmt: skip
        )
    return sides


def _across(train: Side, test: Side, probe: Probe) -> tuple[np.ndarray, Design, int]:
    """(score of each test sample, all test samples as one fold, how many were dropped)."""
    mask = test.chosen.mask[test.chosen.data.position.values.astype(str).tolist().index(probe.position)]
    shared = np.isin(test.data.prompt.values.astype(str), train.data.prompt.values.astype(str))
    shared |= np.isin(test.chosen.groups, train.chosen.groups[train.chosen.labelled])
    use = test.chosen.labelled & mask
    rows = np.flatnonzero(use & ~shared)
    score = np.full(len(use), np.nan)
    score[rows] = score_rows(probe, test.capture, rows)
    return score, replace(test.design, fold=np.where(use, 0, -1), n_folds=1), int((use & shared).sum())


def _row(
    train: Side, test: Side, score: np.ndarray, design: Design, cells: Sequence[At], dropped: int, compat: str | None
) -> dict[str, Any]:
    both = np.isfinite(score) & np.isfinite(test.confident)
    wrong = test.chosen.positive
    probe = _folded(fold_auc(np.where(both, score, np.nan), wrong, design), compat)
    confident = fold_auc(np.where(both, -test.confident, np.nan), wrong, design)
    row = {
        "train": train.name, "test": test.name,
        "cell": ", ".join(f"{layer} {position}" for layer, position in dict.fromkeys(cells)),
        "AUC": round(probe.auc, 3), "95 %": interval(probe.lo, probe.hi), "baseline": round(confident.auc, 3),
        "above baseline": round(probe.auc - confident.auc, 3), "n wrong": probe.n_positive,
        "n correct": probe.n_negative, "dropped": dropped,
    }  # fmt: skip
    return row | ({"why not": probe.reason} if probe.reason else {})


def _folded(auc: FoldAuc, compat: str | None) -> FoldAuc:
    """max(auc, 1 - auc), with its interval turned too."""
    if compat is None or not auc.auc < 0.5:
        return auc
    return replace(auc, auc=1 - auc.auc, lo=1 - auc.hi, hi=1 - auc.lo)


def _notes(choose: str, compat: str | None) -> tuple[str, ...]:
    notes = [
        "An AUC is of the test task's samples with an exact answer, and so is the baseline beside it.",
        "Test samples whose prompt or group the training task has were dropped; within a task, folds keep groups apart.",
    ]
    if choose == "target":
        notes.append("The cell is the test task's best one, chosen on the samples that it is judged on: optimistic.")
    if compat is not None:
        notes.append("compat: an AUC below one half is shown as its distance above it, as if the probe were turned.")
    return tuple(notes)
