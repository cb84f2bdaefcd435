"""Resamples: K answers to each question, drawn at temperature 1: captured once, and read as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hiddenlake.cache.capture import Watcher
from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.job import Job
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.snapshot import samples_of
from hiddenlake.probing.experiments.places import Place, capture_task
from hiddenlake.probing.experiments.taxonomy import Tally, tally

_COLUMNS = ("index", "sample_index", "correct", "exact_answer")


@dataclass(frozen=True, slots=True)
class Resamples:
    """K judged answers to each of some questions.

    index : (question,) int, rows of the task, ascending.  correct : (question, K) bool.
    exact : K exact answers a question, None where there is none.
    row : (question, K) int, the samples' rows in their capture, in task order.
    left_out : questions that lack an answer, or a judgement of one.
    """

    index: np.ndarray
    correct: np.ndarray
    exact: tuple[tuple[str | None, ...], ...]
    row: np.ndarray
    left_out: int

    @property
    def valid(self) -> np.ndarray:
        """(question, K) bool, whether the answer has an exact answer."""
        return np.array([[name is not None for name in names] for names in self.exact], bool)

    def of(self, index: Sequence[int]) -> "Resamples":
        """Those of some questions, which must be there, in this order."""
        at = np.searchsorted(self.index, index)
        return Resamples(
            self.index[at], self.correct[at], tuple(self.exact[i] for i in at), self.row[at], self.left_out
        )

    def tallies(self, first_come: bool = False) -> list[Tally]:
        """One a question: see `taxonomy.tally`."""
        return [tally(right, names, first_come) for right, names in zip(self.correct, self.exact, strict=True)]


def resample(place: Place, job: Job, kind: str, *, engine: str = "vllm", watcher: Watcher | None = None) -> Capture:
    """The answers that a job asks for: of a capture that has them and covers what the job wants, else drawn now.

    kind : of the capture that is made: `Place.other`.

    A capture that some experiment made serves the others too: nothing is drawn twice, where it was drawn with what is
    wanted now. Raises KeyboardInterrupt where drawing was interrupted.
    """
    wanted = {prompt.key for prompt in job.prompts}
    for path in sorted(place.capture.parent.glob(f"{place.name}-resampled*")):
        capture = open_capture(path)
        failed = capture.failures()["key"].to_pylist()
        if _covers(capture, job) and wanted <= {*capture.keys, *failed}:
            return capture
    out = place.other(kind)
    capture_task(job, out, engine=engine, watcher=watcher)
    return open_capture(out)


def _covers(capture: Capture, job: Job) -> bool:
    """Whether the capture has every cell that the job wants. One that wants no layer wants texts only."""
    has, wants = capture.coverage, job.coverage
    return not wants.layers or (
        set(wants.sites) <= set(has.sites)
        and set(wants.layers) <= set(has.layers)
        and set(wants.positions) <= set(has.positions)
    )


def read_resamples(capture: Capture, k: int) -> Resamples:
    """The first k answers to every question that has so many, all judged. Raises ProbeError where none has."""
    table = samples_of(capture.snapshot, _COLUMNS).to_pydict()
    found: dict[int, dict[int, int]] = {}
    for row, (index, number, correct) in enumerate(
        zip(table["index"], table["sample_index"], table["correct"], strict=True)
    ):
        answers = found.setdefault(index, {})
        if number < k and correct is not None:
            answers[number] = row
    full = sorted(index for index, answers in found.items() if len(answers) == k)
    if not full:
        raise ProbeError(f"{capture.path}: no question has {k} judged answers: draw them, or ask for fewer")
    row = np.array([[found[index][number] for number in range(k)] for index in full])
    names = table["exact_answer"]
    return Resamples(
        index=np.array(full),
        correct=np.array(table["correct"], object)[row].astype(bool),
        exact=tuple(tuple(names[i] for i in rows) for rows in row),
        row=row,
        left_out=len(found) - len(full),
    )
