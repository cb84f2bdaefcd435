"""Scores: the curves of one cell's held-out probabilities: ROC, reliability, and how they are spread."""

from dataclasses import dataclass

import numpy as np

from hiddenlake.probing.classification import equal_bins
from hiddenlake.probing.metrics import proportion_interval

# A curve of more points looks the same on a page, and makes it large.
_MOST_POINTS = 400
_BARS = 25


@dataclass(frozen=True, slots=True)
class Roc:
    """false, true, threshold : (point,) rates of alarms among negatives and positives at this probability and above."""

    false: np.ndarray
    true: np.ndarray
    threshold: np.ndarray


@dataclass(frozen=True, slots=True)
class Reliability:
    """mean, share, lo, hi : (bin,) mean probability, share of positives, its 95 % interval.  n : (bin,) samples."""

    mean: np.ndarray
    share: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    n: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the bins' distances, weighted by their samples."""
        return float((np.abs(self.mean - self.share) * self.n).sum() / self.n.sum())


@dataclass(frozen=True, slots=True)
class Spread:
    """edges : (bar + 1,) of probability.  positive, negative : (bar,) samples of each class."""

    edges: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


def roc(probability: np.ndarray, positive: np.ndarray) -> Roc:
    """The ROC curve of (n,) probabilities. Equal ones are one point; of many points, those evenly apart are kept."""
    order = np.argsort(-probability, kind="stable")
    p, hit = probability[order], positive[order]
    last = np.flatnonzero(np.append(p[1:] != p[:-1], True))
    true, false = np.cumsum(hit)[last], np.cumsum(~hit)[last]
    true, false = np.append(0, true) / hit.sum(), np.append(0, false) / (~hit).sum()
    # The first point calls nothing positive: no probability is so high.
    threshold = np.append(np.inf, p[last])
    # Points along the curve, not along the thresholds: none of its corners is far from a kept one.
    along = np.round((true + false) / 2 * _MOST_POINTS)
    kept = np.append(along[1:] != along[:-1], True) if len(along) > _MOST_POINTS else np.ones(len(along), bool)
    kept[0] = True
    return Roc(false[kept], true[kept], threshold[kept])


def reliability(probability: np.ndarray, positive: np.ndarray) -> Reliability:
    """Ten bins of equally many samples, as `ece` of a grid has them; equal probabilities share a bin."""
    order = np.argsort(-probability, kind="stable")
    p, hit = probability[order], positive[order].astype(float)
    _, which = np.unique(equal_bins(p), return_inverse=True)
    n = np.bincount(which)
    mean, share = np.bincount(which, p) / n, np.bincount(which, hit) / n
    lo, hi = proportion_interval(share * n, n)
    return Reliability(*(values[::-1] for values in (mean, share, lo, hi, n)))


def spread(probability: np.ndarray, positive: np.ndarray) -> Spread:
    """How many samples of each class have which probability."""
    edges = np.linspace(0.0, 1.0, _BARS + 1)
    return Spread(edges, *(np.histogram(probability[side], edges)[0] for side in (positive, ~positive)))
