"""Baselines: what the probabilities that the model itself gave its answer say of it. Pure.

The paper's "logits" are raw scores before the softmax. A capture keeps log-probabilities, which differ from them by a
number of their own at each token, and this is what is compared here. The least probability has the ranks, and so the AUC,
of the least log-probability, and is left out.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.positions import ABSENT

ALL = ("logprob mean", "logprob min", "probability mean")
EXACT = tuple(f"{name} exact" for name in ALL)


def confidence(logprobs: Sequence[np.ndarray], first: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
    """How sure the model was of each answer: higher is surer.

    logprobs : of each sample's answer tokens, natural logarithm.
    first, last : (sample,) int, the exact answer's tokens, counted from the answer's first; -1 where there is none.

    Returns ALL over all answer tokens and EXACT over those of the exact answer, each (sample,) float64; NaN where there is
    no such token.
    """
    found = {name: np.full(len(logprobs), np.nan) for name in (*ALL, *EXACT)}
    for i, values in enumerate(logprobs):
        values = np.asarray(values, np.float64)
        inside = values[first[i] : last[i] + 1] if first[i] >= 0 else values[:0]
        for names, some in ((ALL, values), (EXACT, inside)):
            if len(some):
                for name, value in zip(names, (some.mean(), some.min(), np.exp(some).mean()), strict=True):
                    found[name][i] = value
    return found


def confidence_of(data: xr.Dataset) -> dict[str, np.ndarray]:
    """`confidence` of a capture's samples.

    data : as `Capture.dataset` gives it, with the positions exact_answer_first and exact_answer_last.

    Raises UnknownNameError without them.
    """
    there = data.position.values.astype(str).tolist()
    ends = []
    for name in ("exact_answer_first", "exact_answer_last"):
        if name not in there:
            raise UnknownNameError(
                f"the capture has no position {name}: capture it, to know which tokens the exact answer has"
            )
        index = data.token_index.isel(position=there.index(name)).values.astype(int)
        ends.append(np.where(index == ABSENT, -1, index - data.prompt_length.values))
    return confidence(list(data.logprobs.values), *ends)
