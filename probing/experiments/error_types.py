"""The paper's table 2: of which type an error is, told from the greedy answer's activations.

What differs from the paper: a wrong answer without an exact answer is "no answer", where the paper counts those that its
extractor called so and leaves the others out; groups of answers do not depend on their order (compat="llmsknow": they do,
and an answer may be counted twice); labels are judged by the task's own rules, where the paper's code takes TriviaQA's for
all; the probe's cell is chosen, for the label `correct`, on the folds that it is not judged on; every type is fitted on the
same folds, one against the rest of all questions; and rows and labels stay together, which in the paper's code they do not
when it draws its test set.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.experiments.nested import (
    DEFAULT,
    At,
    Settings,
    cells_of,
    design_of,
    fold_auc,
    held_out_scores,
    nested_grid,
)
from hiddenlake.probing.experiments.resamples import Resamples
from hiddenlake.probing.experiments.table import Table, interval
from hiddenlake.probing.experiments.taxonomy import TYPES, UNIONS, types_of
from hiddenlake.probing.selection import select
from hiddenlake.probing.sweep import Progress

# Below this the shares of K that the types are made of fall together: a third less one is a sixth.
FEW_ANSWERS = 12


def typed(found: Resamples, compat: str | None = None) -> dict[str, np.ndarray]:
    """Type, or union of types -> (question,) bool."""
    types = [types_of(counted) for counted in found.tallies(first_come=compat is not None)]
    labels = {name: np.array([name in one for one in types], bool) for name in TYPES}
    unions = {name: labels[parts[0]] | labels[parts[1]] for name, parts in UNIONS.items()}
    return dict(sorted((labels | unions).items()))


def error_types(
    data: xr.Dataset,
    found: Resamples,
    site: str,
    *,
    cell: At | None = None,
    compat: str | None = None,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> Table:
    """How the answers to each question fail, and whether the greedy answer's activations know it.

    data : of the greedy capture, as `Capture.dataset` gives it.  found : K more answers to its questions.
    cell : (layer, position); by default the best for `correct`, chosen on the folds that it is not judged on.

    A question may be of several types. Raises ProbeError, UnknownNameError.
    """
    data, found, lacking = together(data, found)
    labels = typed(found, compat)
    chosen = select(
        data, site, label="correct", groups="group",
        layers=None if cell is None else [cell[0]], positions=None if cell is None else [cell[1]],
    )  # fmt: skip
    design = design_of(chosen, settings)
    cells = [cell] * design.n_folds if cell else cells_of(nested_grid(chosen, settings, progress))
    rows = []
    for name, label in labels.items():
        rows.append(
            {"type": name, "questions": int(label.sum()), "share": round(float(label.mean()), 3)}
            | _probe(label, lambda label: held_out_scores(chosen, design, cells, label), design)
            | {"meaning": TYPES.get(name) or " or ".join(UNIONS[name])}
        )
    wrong = ~data.correct.values.astype(bool)
    some = np.logical_or.reduce([labels[name] for name in TYPES])
    erred = ~found.correct.all(axis=1)
    silent = sum(counted.silent for counted in found.tallies()) / max(1, int((~found.correct).sum()))
    facts = {
        "experiment": "error-types", "model": data.attrs.get("model", ""), "task": data.attrs.get("task", ""),
        "site": chosen.site, "identity": chosen.digest, "answers": found.correct.shape[1], "questions": len(wrong),
        "lacking": lacking, "cells": list(dict.fromkeys(f"{layer} {position}" for layer, position in cells)),
        "typed_of_questions_with_an_error": float(some[erred].mean()) if erred.any() else None,
        "typed_of_greedy_errors": float(some[wrong].mean()) if wrong.any() else None,
        "wrong_answers_without_exact_answer": silent, "compat": compat or "none", "interval": design.interval,
        **asdict(settings),
    }  # fmt: skip
    return Table(rows, facts, _notes(facts))


def together(data: xr.Dataset, found: Resamples) -> tuple[xr.Dataset, Resamples, dict[str, int]]:
    """The judged greedy samples that have K more answers, these in their order, and how many of either lack the other.

    Raises ProbeError where none has both, or a capture has several answers to a question.
    """
    index = data["index"].values
    if len(set(index.tolist())) < len(index):
        raise ProbeError("the greedy capture has several answers to one question: expected one each")
    judged = np.array([value is not None and value == value for value in data.correct.values.tolist()], bool)
    both = np.isin(index, found.index) & judged
    if not both.any():
        raise ProbeError("no question has a greedy answer and all of its others: were they drawn for the same task?")
    lacking = {
        "all of the other answers": int((~np.isin(index, found.index)).sum()),
        "a judged greedy answer": int((~np.isin(found.index, index[judged])).sum()),
    }
    rows = np.flatnonzero(both)
    return data.isel(sample=rows), found.of(index[rows]), {what: n for what, n in lacking.items() if n}


def _probe(label: np.ndarray, score: Callable[[np.ndarray], Any], design: Any) -> dict[str, Any]:
    try:
        held = score(label)
    except ProbeError as error:
        return {"why not": str(error)}
    auc = fold_auc(held.score, label, design)
    return {
        "AUC": round(auc.auc, 3), "95 %": interval(auc.lo, auc.hi), "certified": interval(*held.certified),
        "n type": auc.n_positive, "n others": auc.n_negative,
    }  # fmt: skip


def _notes(facts: dict[str, Any]) -> tuple[str, ...]:
    k = facts["answers"]
    notes = [
        f"{facts['questions']} questions, {k} answers each; the cells of the folds: {', '.join(facts['cells'])}.",
        f"{facts['wrong_answers_without_exact_answer']:.0%} of the wrong answers have no exact answer.",
    ]
    if facts["typed_of_greedy_errors"] is not None:
        notes.append(
            f"{facts['typed_of_greedy_errors']:.0%} of the questions that greedy answers wrongly are of some type."
        )
    if facts["lacking"]:
        notes.append("Left out: " + ", ".join(f"{n} without {what}" for what, n in facts["lacking"].items()) + ".")
    if k < FEW_ANSWERS:
        notes.append(
            f"The types are shares of the paper's 30 answers; of {k} they fall together: draw at least {FEW_ANSWERS}."
        )
    if facts["compat"] != "none":
        notes.append("compat: groups follow the answers' order, and an answer may be counted in several.")
    return tuple(notes)
