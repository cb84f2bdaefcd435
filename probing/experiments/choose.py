"""The paper's tables 13 and 14: of K answers to a question, does a probe pick a right one more often than other ways do?

What differs from the paper: probe and questions are of one data set, of which folds are held out by group, so that no
question trains the probe that picks its answer, nor chooses its layer; all questions count, also those whose greedy answer
has no exact answer (compat="llmsknow": they do not); `random` is its mean over the answers, not one draw; groups of answers do
not depend on their order (compat: they do); intervals are of 1,000 draws of questions, not the spread of five.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.experiments.choices import at_random, by_majority, by_score, mean_intervals
from hiddenlake.probing.experiments.error_types import together, typed
from hiddenlake.probing.experiments.nested import DEFAULT, Settings, cells_of, design_of, nested_grid
from hiddenlake.probing.experiments.resamples import read_resamples
from hiddenlake.probing.experiments.table import Table, interval
from hiddenlake.probing.probe import score_rows
from hiddenlake.probing.selection import Selection, select
from hiddenlake.probing.sweep import Progress
from hiddenlake.probing.train import fit_probe

# Types with fewer questions are not shown, as in the paper.
MIN_QUESTIONS = 30


def layers_of(
    data: xr.Dataset,
    site: str,
    position: str,
    *,
    layer: int | None = None,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """Of each fold of the greedy answers: the layer at which the others know best that they are right.

    layer : the same for all folds instead. Raises ProbeError, UnknownNameError.
    """
    chosen, design = _folds(data, site, position, settings)
    if layer is not None:
        return (layer,) * design.n_folds
    return tuple(best for best, _ in cells_of(nested_grid(chosen, settings, progress)))


def choose(
    data: xr.Dataset,
    drawn: Capture,
    k: int,
    site: str,
    position: str,
    layers: Sequence[int],
    *,
    compat: str | None = None,
    settings: Settings = DEFAULT,
    progress: Progress | None = None,
) -> Table:
    """Pick one of k answers to each question, and count the right ones.

    data : of the greedy capture, as `Capture.dataset` gives it.  drawn : k more answers to each of its questions, with the
        activations of `site` at `position` and the layers.
    layers : one a fold, as `layers_of` gives them for the same data and settings.

    The probe is trained on the greedy answers of the other folds. An answer without an exact answer scores 0.

    Raises ProbeError, UnknownNameError, and IdentityError where `drawn` is of another model.
    """
    chosen, design = _folds(data, site, position, settings)
    data, found, lacking = together(data, read_resamples(drawn, k))
    fold = design.fold[np.isin(chosen.data["index"].values, data["index"].values)]
    score = np.full(found.row.shape, np.nan)
    for f, layer in enumerate(layers):
        others = chosen.data.isel(sample=np.flatnonzero((design.fold != f) & chosen.labelled))
        probe = fit_probe(others, site, layer, position, label="correct", groups="group", **asdict(settings))
        inside = fold == f
        # of being wrong, turned
        score[inside] = -score_rows(probe, drawn, found.row[inside].ravel()).reshape(-1, k)
        if progress is not None:
            progress(f + 1, len(layers))
    greedy, tallies = data.correct.values.astype(float), found.tallies(first_come=compat is not None)
    values = {
        "greedy": greedy,
        "random": at_random(found.correct, found.valid),
        "majority": by_majority(tallies),
        "probe": by_score(found.correct, found.valid, score),
        "any is right": found.correct.any(axis=1).astype(float),
    }
    members = {"all": np.ones(len(greedy), bool)} | typed(found, compat)
    if compat is not None:
        valid = data.exact_answer_valid.values.astype(bool)
        lacking["an exact answer of the greedy one"] = int((~valid).sum())
        members = {name: inside & valid for name, inside in members.items()}
    groups = select(data, site, label="correct", groups="group", positions=[position]).groups
    rows = []
    for name, inside in members.items():
        if name == "all" or inside.sum() >= MIN_QUESTIONS:
            rows += _rows(name, {way: found[inside] for way, found in values.items()}, groups[inside], settings.seed)
    facts = {
        "experiment": "choose", "model": data.attrs.get("model", ""), "task": data.attrs.get("task", ""),
        "site": chosen.site, "position": position, "layers": list(layers), "identity": chosen.digest, "answers": k,
        "questions": int(members["all"].sum()), "lacking": lacking, "compat": compat or "none",
        "interval": "95 %, bootstrap of whole groups of questions", **asdict(settings),
    }  # fmt: skip
    return Table(rows, facts, _notes(facts))


def _folds(data: xr.Dataset, site: str, position: str, settings: Settings) -> tuple[Selection, Any]:
    chosen = select(data, site, label="correct", groups="group", positions=[position])
    return chosen, design_of(chosen, settings)


def _rows(name: str, values: dict[str, np.ndarray], groups: np.ndarray, seed: int) -> list[dict[str, Any]]:
    ways = np.stack(list(values.values()), axis=1)
    above = ways - values["greedy"][:, None]
    lo, hi = mean_intervals(np.concatenate([ways, above], axis=1), groups, seed)
    n = ways.shape[1]
    return [
        {
            "questions": name, "n": len(ways), "choice": way, "accuracy": round(float(ways[:, w].mean()), 3),
            "95 %": interval(lo[w], hi[w]), "above greedy": round(float(above[:, w].mean()), 3),
            "95 % above": interval(lo[n + w], hi[n + w]) if way != "greedy" else "",
        }
        for w, way in enumerate(values)
    ]  # fmt: skip


def _notes(facts: dict[str, Any]) -> tuple[str, ...]:
    layers = ", ".join(map(str, dict.fromkeys(facts["layers"])))
    notes = [
        f"{facts['questions']} questions, {facts['answers']} answers each; the probe is that of {facts['position']}, "
        f"layer {layers} (of the folds), trained on greedy answers to other questions.",
    ]
    if facts["lacking"]:
        notes.append("Left out: " + ", ".join(f"{n} without {what}" for what, n in facts["lacking"].items()) + ".")
    notes.append(
        f"Types are of the same answers that are picked from; those of fewer than {MIN_QUESTIONS} are not shown."
    )
    if facts["compat"] != "none":
        notes.append(
            "compat: only questions whose greedy answer has an exact answer; groups follow the answers' order."
        )
    return tuple(notes)
