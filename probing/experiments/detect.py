"""The paper's Table 1: which scores tell wrong answers from right ones: the model's own confidence, p(True), and probes.

What differs from the paper: every row is of the same samples and the same folds, where the paper's rows are of what each
script kept; intervals are of cross-validation, not the spread of five draws of one test set; a probe's layer is chosen on
the folds that it is not judged on, and probes are certified optima; log-probabilities stand for raw logits, which no
capture keeps (see `baselines`). Of p(True) both orders of the two choices are shown, and the better, which the paper reports,
is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.positions import ABSENT
from hiddenlake.probing.experiments.baselines import confidence_of
from hiddenlake.probing.experiments.nested import (
    DEFAULT,
    FoldAuc,
    Settings,
    cells_of,
    design_of,
    fold_auc,
    held_out_scores,
    nested_grid,
)
from hiddenlake.probing.experiments.table import Table, interval
from hiddenlake.probing.selection import select
from hiddenlake.probing.sweep import Progress

POSITIONS = (
    "last_q", "exact_answer_before_first", "exact_answer_last", "exact_answer_after_last", "-2", "-1"
)  # fmt: skip


def comparable(data: xr.Dataset, positions: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """The samples that every row can speak of, and how many lack what.

    Returns (sample,) bool, whether it has a label, a valid exact answer and a token at each position; and counts of what
    is missing, each sample counted once, at the first thing that it lacks.
    """
    there = data.position.values.astype(str).tolist()
    needed = {
        "a label": np.array([value is not None and value == value for value in data.correct.values.tolist()], bool),
        "an exact answer": data.exact_answer_valid.values.astype(bool),
    }
    for position in positions:
        if position in there:
            index = data.token_index.transpose("position", "sample").values[there.index(position)]
            needed[f"a token at {position}"] = index != ABSENT
    usable, lacking = np.ones(data.sizes["sample"], bool), {}
    for what, has in needed.items():
        if missing := int((usable & ~has).sum()):
            lacking[what] = missing
        usable &= has
    return usable, lacking


def detect(
    data: xr.Dataset,
    site: str,
    *,
    positions: Sequence[str] = POSITIONS,
    p_true: Mapping[tuple[str, bool], np.ndarray] | None = None,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> Table:
    """Compare detectors of errors on one capture.

    data : as `Capture.dataset` gives it.  site : of the probes.  positions : of the probes; any that the capture holds.
    p_true : log-odds of true by way, (sample,), as `p_true.read_p_true` gives them; samples that are NaN are left out of all
        rows.

    A position may lie in the prompt here (`exact_answer_before_first` of an answer that begins with its exact answer): it
    is the token that it says, and "in prompt" counts them.

    Raises ProbeError where samples cannot be split, UnknownNameError.
    """
    usable, lacking = comparable(data, positions)
    for odds in (p_true or {}).values():
        if missing := int((usable & ~np.isfinite(odds)).sum()):
            lacking["an answer to p(True)"] = lacking.get("an answer to p(True)", 0) + missing
            usable = usable & np.isfinite(odds)
    if not usable.any():
        raise ProbeError(f"no sample of {len(usable)} can be compared: they lack {_words(lacking)}")
    data = data.isel(sample=np.flatnonzero(usable))
    chosen = select(data, site, label="correct", groups="group", positions=list(positions), in_answer=False)
    design = design_of(chosen, settings)
    wrong = chosen.positive
    rows = [
        _row(
            name,
            "exact answer" if name.endswith("exact") else "answer",
            fold_auc(-values, wrong, design, trained=False),
        )
        for name, values in confidence_of(data).items()
    ]
    rows += _p_true_rows(
        {way: fold_auc(-odds[usable], wrong, design, trained=False) for way, odds in (p_true or {}).items()}
    )
    grid = nested_grid(chosen, settings, progress)
    gap = 0.0
    for p, position in enumerate(positions):
        cells = cells_of(grid.isel(position=[p]))
        found = held_out_scores(chosen, design, cells)
        gap = max(gap, found.relative_gap)
        inside = chosen.data.token_index.isel(position=p).values >= data.prompt_length.values
        rows.append(
            _row("probe", position, fold_auc(found.score, wrong, design))
            | {
                "layers": ", ".join(map(str, dict.fromkeys(layer for layer, _ in cells))),
                "in prompt": int((~inside).sum()),
            }
        )
    facts = {
        "experiment": "detect", "model": data.attrs.get("model", ""), "task": data.attrs.get("task", ""),
        "site": chosen.site, "identity": chosen.digest, "samples": len(usable), "compared": int(usable.sum()),
        "lacking": lacking, "n_groups": len(set(chosen.groups.tolist())), "interval": design.interval,
        "max_relative_gap": gap, **asdict(settings),
    }  # fmt: skip
    return Table(rows, facts, _notes(facts, bool(p_true)))


def _p_true_rows(found: Mapping[tuple[str, bool], FoldAuc]) -> list[dict[str, Any]]:
    best = {answer: max(auc.auc for (of, _), auc in found.items() if of == answer) for answer, _ in found}
    return [
        _row(f"p(True), {'A' if true_first else 'B'} is true" + ", better" * (auc.auc == best[answer]), answer, auc)
        for (answer, true_first), auc in found.items()
    ]


def _row(method: str, tokens: str, auc: FoldAuc) -> dict[str, Any]:
    row = {
        "method": method, "tokens": tokens, "AUC": round(auc.auc, 3), "95 %": interval(auc.lo, auc.hi),
        "n wrong": auc.n_positive, "n correct": auc.n_negative,
    }  # fmt: skip
    return row | ({"why not": auc.reason} if auc.reason else {})


def _notes(facts: dict[str, Any], asked: bool) -> tuple[str, ...]:
    notes = [
        f"{facts['compared']} of {facts['samples']} answers are compared, in every row the same"
        + (f"; some lack {_words(facts['lacking'])}" if facts["lacking"] else "")
        + ".",
        "The paper's logits are raw scores, which are not stored: log-probabilities stand for them.",
        "A probe's layer is chosen on the folds that it is not judged on; C, scale and folds are given, not chosen.",
    ]
    if asked:
        notes.append("The better order of p(True) is chosen on the samples that it is judged on: optimistic.")
    return tuple(notes)


def _words(lacking: Mapping[str, int]) -> str:
    return ", ".join(f"{what} ({n})" for what, n in lacking.items())
