"""Choices: one of several answers to a question, picked in the paper's ways, and how often that is right. Pure."""

from collections.abc import Sequence

import numpy as np

from hiddenlake.probing.experiments.taxonomy import Tally
from hiddenlake.probing.metrics import RESAMPLES

# Replicates drawn at a time: their counts of 100,000 questions take 40 MB.
_BLOCK = 50


def at_random(correct: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(question,) float64, the share of right ones among the answers with an exact answer: what picking one at random is
    worth on average; 0 where no answer has one.

    correct, valid : (question, K) bool.
    """
    count = valid.sum(axis=1)
    return np.where(count > 0, (correct & valid).sum(axis=1) / np.maximum(count, 1), 0.0)


def by_majority(tallies: Sequence[Tally]) -> np.ndarray:
    """(question,) float64, 1 where the right answers are more than any group of wrong ones; a tie is lost."""
    return np.array([float(counted.right > counted.largest_wrong) for counted in tallies])


def by_score(correct: np.ndarray, valid: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(question,) float64, 1 where the answer of the highest score is right; of equal ones, the first.

    score : (question, K), higher where an answer is likelier right. Answers without an exact answer score nothing, and are
        picked only where no answer has one: then it is the first. NaN where there is no score.
    """
    ranked = np.where(valid & ~np.isnan(score), score, -np.inf)
    return np.take_along_axis(correct, ranked.argmax(axis=1)[:, None], axis=1)[:, 0].astype(float)


def mean_intervals(values: np.ndarray, group: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals of means, with whole groups drawn with replacement: for each column the same draws.

    values : (n, k).  group : (n,) names.

    Returns lower and upper bounds, (k,).
    """
    names, member = np.unique(group, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, member, values)
    sizes = np.bincount(member, minlength=len(names))
    generator = np.random.default_rng([seed, 0xC401CE])
    means = []
    for start in range(0, RESAMPLES, _BLOCK):
        share = np.full(len(names), 1.0 / len(names))
        draws = generator.multinomial(len(names), share, size=min(_BLOCK, RESAMPLES - start))
        means.append(draws @ sums / (draws @ sizes)[:, None])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high
