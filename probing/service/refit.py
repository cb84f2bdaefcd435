"""Refit: held-out scores of a grid's cells, computed by one child process, so that the server needs no torch.

Child and server speak JSON, a line a message, over the child's stdin and stdout; see `refit_child`.
"""

import base64
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiddenlake.cache.service.problems import Problem

# Cells whose scores are remembered: of 100,000 samples and a width of 8192 each takes 2 MB.
_HELD = 64

# Cells that may wait for the one that is being fitted.
_WAITING = 32


@dataclass(frozen=True, slots=True)
class Refitted:
    """One cell, fitted again.

    shown : what the page draws, as JSON.
    coef, intercept : (fold, d) and (fold,) float64, of the stored activations.
    fold : (sample,) which probe did not see each sample of the capture; -1 where the cell does not have it.
    """

    shown: dict[str, Any]
    coef: np.ndarray
    intercept: np.ndarray
    fold: np.ndarray

    def score(self, X: np.ndarray, row: int) -> np.ndarray:
        """(n,) log-odds of (n, d) activations of the sample in this row, by the probe that did not see it. Of a sample
        that no probe saw, the mean of all probes' log-odds."""
        fold = int(self.fold[row])
        chosen = slice(fold, fold + 1) if fold >= 0 else slice(None)
        return (X.astype(np.float64) @ self.coef[chosen].T + self.intercept[chosen]).mean(axis=1)


class Refits:
    """Cells by key, each computed once, one at a time. The child starts with the first cell, and ends with this process."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hiddenlake-refit")
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, Future[Refitted]] = OrderedDict()
        self._child: subprocess.Popen | None = None

    def get(self, key: Any, question: dict[str, Any]) -> tuple["Future[Refitted]", int]:
        """(the cell, how many others are computed before it).

        key : names the cell, and the moment of its grid and its capture.  question : of `refit_child`.

        Raises Problem (429) where too many cells wait.
        """
        with self._lock:
            waiting = [known for known in self._known.values() if not known.done()]
            found = self._known.get(key)
            # What failed is tried again: it may have failed for what has changed since.
            if found is not None and not (found.done() and found.exception() is not None):
                self._known.move_to_end(key)
                return found, waiting.index(found) if found in waiting else 0
            if len(waiting) >= _WAITING:
                raise Problem(
                    429, "too_many_cells", f"{len(waiting)} cells wait to be fitted again", "wait, and ask again",
                    headers={"Retry-After": "5"},
                )  # fmt: skip
            found = self._known[key] = self._pool.submit(self._ask, question)
            for old in [k for k, known in self._known.items() if known.done()][: max(0, len(self._known) - _HELD)]:
                del self._known[old]
            return found, len(waiting)

    def _ask(self, question: dict[str, Any]) -> Refitted:
        # One that ended while nobody asked (a machine short of memory ends who has slept longest) is not the fault of
        # this cell: it is asked of a new one.
        line = (self._answer(self._child, question) if self._child else b"") or self._answer(self._start(), question)
        if not line:
            raise Problem(
                503, "refit", "the process that fits cells again has ended before it answered",
                "ask again; if it stays, the server's machine may have too little memory for this cell",
            )  # fmt: skip
        answer = json.loads(line)
        if "problem" in answer:
            raise Problem(**answer["problem"])
        arrays = {name: _array(value) for name, value in answer["arrays"].items()}
        return Refitted(answer["shown"], **arrays)

    def _answer(self, child: subprocess.Popen, question: dict[str, Any]) -> bytes:
        """A line; nothing where the child has ended."""
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = b""
        if not line:
            # Its pipes close before it can be waited for.
            self._child = None
            child.kill()
            child.wait()
        return line

    def _start(self) -> subprocess.Popen:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "hiddenlake.probing.service.refit_child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return self._child


def as_text(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON has it."""
    array = np.ascontiguousarray(array)
    return {"dtype": array.dtype.str, "shape": array.shape, "base64": base64.b64encode(array.tobytes()).decode()}


def _array(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])
