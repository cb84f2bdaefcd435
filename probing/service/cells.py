"""Cells: one cell's held-out scores as the page shows them, and how they are asked for."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from pydantic import BaseModel, Field

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.service.findings import Findings, StoredGrid
from hiddenlake.probing.service.heat import entry, no_cells, which_C
from hiddenlake.probing.service.refit import Refits, Refitted


class Waiting(BaseModel):
    """What is asked for is being computed: ask again."""

    state: str = Field(examples=["fitting"], description="`waiting` behind other cells, or `fitting`.")
    before: int = Field(description="Cells that are computed first.")
    doing: str = Field(description="In a sentence.")


class Curve(BaseModel):
    """Rates of alarms among negatives and positives, at each threshold and above; the first calls nothing positive."""

    false: list[float]
    true: list[float]
    threshold: list[float | None]


class Calibration(BaseModel):
    """Bins of equally many samples. lo, hi : 95 % interval of the share."""

    mean: list[float]
    share: list[float]
    lo: list[float]
    hi: list[float]
    n: list[int]
    ece: float


class Histogram(BaseModel):
    """Samples of each class by probability."""

    edges: list[float]
    positive: list[int]
    negative: list[int]


class WrongSample(BaseModel):
    """A sample. before, exact, after : its answer, cut around the exact answer; without one all of it is `before`."""

    key: str
    index: int
    prompt: str
    before: str
    exact: str
    after: str
    gold: list[str]
    label: str
    probability: float = Field(description="Of the positive class, by the probe that did not see it.")


class Cell(BaseModel):
    """One cell's held-out scores: every sample is scored by the probe of the other folds."""

    layer: int
    position: str
    C: float
    auc: float = Field(description="Mean of the folds'.")
    fold_auc: list[float]
    n: int
    n_positive: int
    converged: bool
    roc: Curve
    fold_roc: list[Curve]
    calibration: Calibration
    histogram: Histogram
    alarms: list[WrongSample] = Field(description="Negatives of the highest probability.")
    missed: list[WrongSample] = Field(description="Positives of the lowest.")


@dataclass(frozen=True, slots=True)
class Asked:
    """A cell that is there, or will be. before : how many come first.  doing : for who waits."""

    future: Any
    C: float
    before: int
    doing: str

    async def wait(self, seconds: float) -> Refitted | None:
        """None where it takes longer. Raises what computing it raised."""
        try:
            # Others may wait for it too.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self.future)), seconds)
        except TimeoutError:
            return None

    def later(self, response: Response) -> Waiting:
        response.status_code = 202
        response.headers["Retry-After"] = "1"
        return Waiting(state="waiting" if self.before else "fitting", before=self.before, doing=self.doing)


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of all grids. lake : its path, which no message shows."""

    findings: Findings
    refits: Refits
    lake: str

    def ask(
        self, capture: Capture, stored: StoredGrid, layer: int, position: str, C: float | None, settings: Settings
    ) -> Asked:
        """Raises Problem, UnknownNameError for what the grid does not have, StoreError."""
        if reason := no_cells(stored.attrs, capture):
            raise Problem(
                409, "no_scores", reason, "fit a grid of this capture that is cross-validated, or ask for another one"
            )
        grid = self.findings.open(stored)
        for axis, wanted in (("layer", layer), ("position", position)):
            if wanted not in (there := grid[axis].values.tolist()):
                raise UnknownNameError(f"the grid has no such {axis}: it has {', '.join(map(str, there))}")
        which = which_C(grid, entry(stored, capture), C)
        # As float32; beside them are the solver's own, which it bounds by itself.
        needed = 4 * len(capture) * capture.coverage.widths.get(stored.attrs["site"], 0)
        if needed > settings.max_read:
            raise Problem(
                413,
                "too_large",
                f"the cell's activations are {needed} bytes, {int(settings.max_read)} are read for one answer",
                "have the server started with a larger --max-read",
            )
        moment = capture.snapshot.name
        question = {
            "capture": capture.path, "grid": str(stored.path), "lake": self.lake, "snapshot": moment,
            "layer": layer, "position": position, "C": which,
        }  # fmt: skip
        key = (stored.path, stored.version, capture.path, moment, layer, position, which)
        future, before = self.refits.get(key, question)
        doing = (
            f"The {stored.attrs['cv']} probes of layer {layer}, {position} are fitted again, for the scores of the samples that "
            f"each did not see{f'; {before} other cells come first' if before else ''}."
        )
        return Asked(future, float(grid.C.values.reshape(-1)[which]), before, doing)
