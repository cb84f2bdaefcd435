"""Examples: the samples that a probe gets most wrong, with their texts."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hiddenlake.cache.spans import find_ignoring_case

# Of each direction: as many as a reader looks at.
COUNT = 10

# Of a prompt or an answer: a document in a prompt would hide what was asked.
_MOST_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Example:
    """One sample.

    before, exact, after : its answer, cut around the exact answer; without one all of it is `before`.
    gold : the right answers.  probability : of the positive class, by the probe that did not see it.
    """

    key: str
    index: int
    prompt: str
    before: str
    exact: str
    after: str
    gold: tuple[str, ...]
    label: str
    probability: float


def most_wrong(data: xr.Dataset, scores: xr.Dataset, names: tuple[str, str]) -> tuple[list[Example], list[Example]]:
    """The negatives of the highest probability, and the positives of the lowest: those that the AUC loses most by.

    No probability is a bound: where one class is rare or the penalty strong, none comes near one half.

    data : the capture's Dataset.  scores : from held_out, of the same samples.  names : of the positive and negative class.
    """
    probability, positive = scores.probability.values, scores.positive.values.astype(bool)
    scored = np.isfinite(probability)
    alarms, missed = np.flatnonzero(scored & ~positive), np.flatnonzero(scored & positive)
    keys = scores.sample.values.astype(str)
    # By key where probabilities are equal, so that the page does not depend on the samples' order.
    alarms = alarms[np.lexsort((keys[alarms], -probability[alarms]))][:COUNT]
    missed = missed[np.lexsort((keys[missed], probability[missed]))][:COUNT]
    return tuple(
        [_example(data.isel(sample=int(row)), float(probability[row]), name) for row in rows]
        for rows, name in ((alarms, names[1]), (missed, names[0]))
    )


def _example(sample: xr.Dataset, probability: float, label: str) -> Example:
    prompt, answer = str(sample.prompt.item()), str(sample.answer.item())
    exact = sample.exact_answer.item() if bool(sample.exact_answer_valid) else None
    found = find_ignoring_case(answer, exact.strip()) if isinstance(exact, str) else None
    start, end = found or (len(answer), len(answer))
    return Example(
        key=str(sample.sample.item()),
        index=int(sample["index"]),
        prompt=shortened(prompt),
        before=shortened(answer[:start]),
        exact=answer[start:end],
        after=shortened(answer[end:]),
        gold=tuple(map(str, sample.answers.item())),
        label=label,
        probability=probability,
    )


def shortened(text: str) -> str:
    """A text, or both ends of a long one, which then says what is left out."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters are left out ...]\n{text[-half:]}"
