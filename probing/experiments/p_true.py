"""p(True): what a model says when it is asked whether its own answer is true (Kadavath et al. 2022; the paper's prompts).

The probability of `A` against `B` is that of the first token after the prompt, exactly: prompt and letter are fed, and the
letter's log-probability is read. The paper takes it from the scores of one generated token, which are the same numbers.

What differs from the paper: the answer is as its reader sees it, without the special tokens that end it, and the question
is what the model was asked, where the paper takes it from before its prompt was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from hiddenlake.cache.capture import Watcher
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.job import Job, plan_job
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.snapshot import samples_of
from hiddenlake.probing.experiments.places import LEAST, capture_task
from hiddenlake.probing.tasks.questions import digest

RULES = "p(True)/1"

LETTERS = ("A", "B")
# (which answer is judged, whether A means true): the rows of the result.
WAYS = tuple((answer, true_first) for answer in ("answer", "exact answer") for true_first in (True, False))


@dataclass(frozen=True, slots=True)
class PTrueTask:
    """One question a sample, way and letter, with the letter given; in that order."""

    name: str
    rules: str
    questions: tuple[Question, ...]
    digest: str

    def judge(self, question: Question, answer: str) -> Judgement:
        """Nothing is right or wrong."""
        return Judgement(None, None)


def prompt(question: str, answer: str, true_first: bool) -> str:
    """The paper's words, with the blanks at the beginning of its lines."""
    first, second = ("True", "False") if true_first else ("False", "True")
    lines = (
        f"Question: {question}", f"Possible answer: {answer}", "Is the possible answer:", f"(A) {first}",
        f"(B) {second}", "The possible answer is:",
    )  # fmt: skip
    return f"\n{' ' * (12 if true_first else 8)}".join(lines)


def ask(data: xr.Dataset, questions: Sequence[Question]) -> PTrueTask:
    """The task for the samples of a capture.

    data : as `Capture.dataset` gives it, of samples with a valid exact answer.  questions : of the captured task.
    """
    asked = []
    columns = (data[name].values.tolist() for name in ("index", "answer", "exact_answer", "group"))
    for index, answer, exact, group in zip(*columns, strict=True):
        for which, true_first in WAYS:
            text = prompt(questions[index].question, answer if which == "answer" else exact, true_first)
            asked += [Question(len(asked) + k, text, (), group=group, given=letter) for k, letter in enumerate(LETTERS)]
    name = f"{data.attrs.get('task', '')} p(True)"
    return PTrueTask(name, RULES, tuple(asked), digest(asked))


def p_true_job(model: str, task: PTrueTask, dtype: str | None = None) -> Job:
    """What is to be fed. Raises BadInputError where the model's tokenizer spells a letter in several tokens."""
    job = plan_job(model, task, **LEAST, dtype=dtype)
    for one in job.prompts[: len(LETTERS)]:
        if len(one.given) != 1:
            raise BadInputError(f"the tokenizer spells {one.question.given!r} in {len(one.given)} tokens: expected one")
    return job


def read_p_true(capture: Capture, job: Job, n: int) -> dict[tuple[str, bool], np.ndarray]:
    """Log-odds of true, of n samples in the order of `ask`, by way, (n,) float64; NaN where a prompt could not be fed."""
    table = samples_of(capture.snapshot, ["key", "logprobs"])
    known = dict(zip(table["key"].to_pylist(), map(sum, table["logprobs"].to_pylist()), strict=True))
    logprob = np.full(n * len(WAYS) * len(LETTERS), np.nan)
    for one in job.prompts:
        logprob[one.question.index] = known.get(one.key, np.nan)
    a, b = np.moveaxis(logprob.reshape(n, len(WAYS), len(LETTERS)), -1, 0)
    return {way: (a - b if way[1] else b - a)[:, w] for w, way in enumerate(WAYS)}


def p_true(
    data: xr.Dataset,
    usable: np.ndarray,
    questions: Sequence[Question],
    model: str,
    out: Path,
    *,
    dtype: str | None = None,
    engine: str = "vllm",
    watcher: Watcher | None = None,
) -> dict[tuple[str, bool], np.ndarray]:
    """Ask, or read what was asked before.

    usable : (sample,) bool, which samples of `data` to ask about.  out : the capture of what was fed.

    Returns log-odds of true by way, (sample,); NaN where nothing was asked, or the prompt is longer than the context.
    """
    rows = np.flatnonzero(usable)
    job = p_true_job(model, ask(data.isel(sample=rows), questions), dtype)
    capture_task(job, out, engine=engine, watcher=watcher)
    found = {}
    for way, odds in read_p_true(open_capture(out), job, len(rows)).items():
        found[way] = np.full(len(usable), np.nan)
        found[way][rows] = odds
    return found
