"""The process that fits cells again: one question a line on stdin, one answer a line on stdout. It ends with its stdin."""

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from hiddenlake.cache.service.problems import Problem, problem_of
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.probing.report.examples import most_wrong
from hiddenlake.probing.report.scores import reliability, roc, spread
from hiddenlake.probing.saving import classes, open_grid
from hiddenlake.probing.service.heat import plain
from hiddenlake.probing.service.refit import as_text


def refit(question: dict[str, Any]) -> dict[str, Any]:
    """What `Refits` answers with. Raises HiddenlakeError.

    question : capture and grid, paths; lake, which no message shows; snapshot, of the capture; layer, position and C,
        numbers and a name of the grid.
    """
    from hiddenlake.probing.report.again import ChangedError, fit_again

    capture = open_capture(question["capture"])
    if capture.snapshot.name != question["snapshot"]:
        raise Problem(409, "changed", "the capture has changed since it was asked for", "ask again")
    grid = open_grid(question["grid"])
    C = float(grid.C.values.reshape(-1)[question["C"]])
    try:
        found = fit_again(capture, grid, question["layer"], question["position"], C)
    except ChangedError as error:
        message = problem_of(error, question["lake"]).message
        raise Problem(409, "changed", message, "fit the grid again") from error
    inside = np.flatnonzero(found.fold.values >= 0)
    probability, positive, fold = (found[name].values[inside] for name in ("probability", "positive", "fold"))
    bins = reliability(probability, positive)
    alarms, missed = most_wrong(capture.dataset(), found, classes(grid))
    shown = {
        "auc": found.attrs["auc"],
        "fold_auc": found.fold_auc.values,
        "n": len(inside),
        "n_positive": int(positive.sum()),
        "converged": found.attrs["converged"],
        "roc": asdict(roc(probability, positive)),
        "fold_roc": [asdict(roc(probability[fold == f], positive[fold == f])) for f in np.unique(fold)],
        "calibration": asdict(bins) | {"ece": bins.error},
        "histogram": asdict(spread(probability, positive)),
        "alarms": [asdict(one) for one in alarms],
        "missed": [asdict(one) for one in missed],
    }
    arrays = {"coef": found.coef.values, "intercept": found.intercept.values, "fold": found.fold.values.astype("<i2")}
    return {"shown": plain(shown), "arrays": {name: as_text(values) for name, values in arrays.items()}}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        return refit(question)
    except Exception as error:  # whatever it is, who asked is waiting
        problem = problem_of(error, question["lake"])
    return {"problem": {name: getattr(problem, name) for name in ("status", "kind", "message", "remedy")}}


def main() -> None:
    # What libraries print must not stand among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            questions.put(line)
        os._exit(0)  # the server is gone: nothing here is worth an end in order

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answers.write(json.dumps(answer(json.loads(questions.get()))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
