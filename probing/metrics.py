"""Metrics: tie-exact AUROC of many columns, its DeLong variance, and intervals.

Shape letters: n samples, k columns, B bootstrap replicates.
"""

from dataclasses import dataclass

import numpy as np

# Two-sided 95 % of a normal distribution.
_Z95 = 1.959963984540054
# The 2.5 % quantile of 1000 replicates has 25 of them outside: its error is a tenth of the interval's width.
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Auroc:
    """auc, variance : (k,) float64. The variance is DeLong's; NaN with fewer than two samples of a class."""

    auc: np.ndarray
    variance: np.ndarray


def auroc(scores: np.ndarray, positive: np.ndarray, use: np.ndarray | None = None) -> Auroc:
    """Area under the ROC curve of each column: P(score of a positive > score of a negative) + P(equal) / 2.

    scores : (n, k).  positive : (n, k) bool.  use : (n, k) bool, the samples that count; all by default.

    Ties count half, exactly. The variance is DeLong, DeLong and Clarke-Pearson 1988, from the sorted
    scores as in Sun and Xu 2014 (IEEE Signal Processing Letters 21). A column with one class is NaN.
    """
    scores = np.asarray(scores, np.float64)
    use = np.ones(scores.shape, bool) if use is None else np.asarray(use)
    positive = np.asarray(positive)
    order = np.argsort(scores, axis=0, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=0)
    is_positive = np.take_along_axis(positive & use, order, axis=0)
    is_negative = np.take_along_axis(~positive & use, order, axis=0)
    start, end = _tie_bounds(ordered)
    n_positive, n_negative = is_positive.sum(axis=0), is_negative.sum(axis=0)
    # How many of the other class lie below each sample, a tie counting half.
    negatives_below = _midpoint(is_negative, start, end)
    positives_below = _midpoint(is_positive, start, end)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_positive = negatives_below / n_negative
        of_negative = 1.0 - positives_below / n_positive
        auc = (of_positive * is_positive).sum(axis=0) / n_positive
        auc = np.where((n_positive > 0) & (n_negative > 0), auc, np.nan)
        variance = _variance(of_positive, is_positive, n_positive) / n_positive
        variance += _variance(of_negative, is_negative, n_negative) / n_negative
    return Auroc(auc, variance)


def _tie_bounds(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and one past the last row of the tie that each row of sorted columns belongs to."""
    n = len(ordered)
    rows = np.arange(n)[:, None]
    new = np.ones(ordered.shape, bool)
    new[1:] = ordered[1:] != ordered[:-1]
    start = np.maximum.accumulate(np.where(new, rows, 0), axis=0)
    last = np.ones(ordered.shape, bool)
    last[:-1] = new[1:]
    end = np.minimum.accumulate(np.where(last, rows + 1, n)[::-1], axis=0)[::-1]
    return start, end


def _midpoint(counted: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    total = np.zeros((len(counted) + 1, counted.shape[1]))
    np.cumsum(counted, axis=0, out=total[1:])
    return 0.5 * (np.take_along_axis(total, start, axis=0) + np.take_along_axis(total, end, axis=0))


def _variance(values: np.ndarray, inside: np.ndarray, count: np.ndarray) -> np.ndarray:
    mean = np.where(inside, values, 0.0).sum(axis=0) / count
    squares = (np.where(inside, values - mean, 0.0) ** 2).sum(axis=0)
    return np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan)


def delong_interval(auc: np.ndarray, variance: np.ndarray, trained: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean of the folds' AUCs, clipped to [0, 1].

    auc, variance : (..., F) one a fold; the variance is of its test samples, for given scores (DeLong's, or
        `bootstrap_variance`).
    trained : whether the scores of each fold are of a probe that was trained on the other folds.

    Untrained scores of several folds are independent, and their mean has the variance sum_f variance_f / F^2. Folds of a
    cross-validation are not: that i is told apart by what was learned from j, and j by what was learned from i, is one
    coincidence counted twice. Where labels carry nothing, the error of fold i is a sum of symmetric terms over the
    other folds, e_i = sum_j h(i, j), so that any two folds correlate by 1 / (F - 1) and the variance of the mean is
    twice as large, whatever F. That is taken here. With signal the probes agree and the correlation falls: then the
    interval is wider than it need be (benchmarks/calibration.py has the numbers). Nadeau and Bengio (Machine Learning 52,
    2003) correct the spread between folds for the same reason, by a guess that comes to 2.25 times at five folds.

    Returns lower and upper bound, (...,).
    """
    n_folds = auc.shape[-1]
    total = variance.sum(axis=-1) * (2.0 if trained and n_folds > 1 else 1.0)
    half = _Z95 * np.sqrt(total) / n_folds
    mean = auc.mean(axis=-1)
    return np.clip(mean - half, 0.0, 1.0), np.clip(mean + half, 0.0, 1.0)


def proportion_interval(count: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share, count of n, each (...,): that of Wilson (1927). Lower and upper bound, (...,)."""
    count, n = np.asarray(count, np.float64), np.asarray(n, np.float64)
    share, square = count / n, _Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 / (1 + square / n) * np.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return np.clip(middle - half, 0.0, share), np.clip(middle + half, share, 1.0)


def bootstrap_interval(
    scores: np.ndarray, positive: np.ndarray, fold: np.ndarray, group: np.ndarray, *, seed: int, trained: bool = True
) -> tuple[float, float]:
    """95 % interval of the mean of the folds' AUCs, for samples that are not independent.

    The arguments are those of `bootstrap_variance` and `delong_interval`. Folds without both classes are left out.
    """
    folds = [f for f in np.unique(fold) if 0 < positive[fold == f].sum() < (fold == f).sum()]
    auc = np.array([auroc(scores[fold == f][:, None], positive[fold == f][:, None]).auc[0] for f in folds])
    inside = np.isin(fold, folds)
    variance = bootstrap_variance(scores[inside], positive[inside], fold[inside], group[inside], seed=seed)
    low, high = delong_interval(auc, variance, trained)
    return float(low), float(high)


def bootstrap_variance(
    scores: np.ndarray, positive: np.ndarray, fold: np.ndarray, group: np.ndarray, *, seed: int
) -> np.ndarray:
    """Variance of each fold's AUC when whole groups are drawn with replacement, one fewer than there are.

    As many as there are would vary by (G - 1) / G too little, which tells where a fold has few groups (Rao and Wu, Journal
    of the American Statistical Association 83, 1988).

    scores : (n,), each from the probe that did not see the sample.  positive : (n,) bool.
    fold, group : (n,) int; a group lies in one fold.

    For samples that are not independent: answers to one prompt, questions with one gold answer.
    Replicates in which a fold has one class only are left out.

    Returns (F,) of the folds in their order; NaN where a fold has one class, or one group, only.
    """
    generator = np.random.default_rng([seed, 0xB007])
    found = []
    for f in np.unique(fold):
        inside = fold == f
        replicates = _bootstrap(scores[inside], positive[inside], group[inside], generator)
        there = replicates[np.isfinite(replicates)]
        found.append(there.var(ddof=1) if len(there) > 1 else np.nan)
    return np.array(found)


def _bootstrap(
    scores: np.ndarray, positive: np.ndarray, group: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    names, member = np.unique(group, return_inverse=True)
    draws = generator.multinomial(len(names) - 1, np.full(len(names), 1.0 / len(names)), size=RESAMPLES).T
    order = np.argsort(scores, kind="stable")
    member, is_positive = member[order], positive[order]
    start, end = (bound[:, 0] for bound in _tie_bounds(scores[order][:, None]))
    # Negatives that each replicate holds below each row of the sorted scores; (negatives + 1, B).
    drawn = np.zeros((int((~is_positive).sum()) + 1, RESAMPLES))
    np.cumsum(draws[member[~is_positive]], axis=0, out=drawn[1:])
    seen = np.concatenate([[0], np.cumsum(~is_positive)])
    below = drawn[seen[start[is_positive]]] + drawn[seen[end[is_positive]]]
    weight = draws[member[is_positive]]
    pairs = weight.sum(axis=0) * drawn[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, 0.5 * np.einsum("ib,ib->b", weight, below) / pairs, np.nan)
