"""What held-out probabilities are worth beside their AUROC: precision, decisions at one half, calibration.

Shape letters: n samples, k columns. A positive sample is an error where the label is `correct`.
"""

import numpy as np

# Each holds as many samples as the others, but for ties.
_BINS = 10

# The false positives that a detector of errors may have, of all negatives, where its recall is asked for.
_FALSE_POSITIVES = 0.01

METRICS = {
    "auprc": "average precision",
    "base_rate": "share of positives, which is the AUPRC of chance",
    "accuracy": "share of decisions at probability one half that are right",
    "majority_accuracy": "accuracy of naming the larger class always",
    "balanced_accuracy": "mean of both classes' recall",
    "f1": "F1 of the positive class",
    "precision": "precision of the positive class",
    "recall": "recall of the positive class",
    "recall_at_1_fpr": "recall of the positive class with false positives of at most 1 % of the negatives",
    "log_loss": "mean negative log-likelihood, nats",
    "brier": "mean squared error of the probability",
    "ece": "expected calibration error over ten bins of equal size",
}


def classify(probability: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """All METRICS of each column.

    probability : (n, k) of being positive, each from a probe that did not see the sample.  positive : (n,) bool.

    Equal probabilities are one threshold, so that nothing depends on the samples' order. A ratio of nothing is 0,
    as in scikit-learn; with one class only, what needs both is NaN.

    Returns name -> (k,) float64.
    """
    probability, positive = np.asarray(probability, np.float64), np.asarray(positive, bool)
    columns = [_column(p, positive) for p in probability.T]
    return {name: np.array([column[name] for column in columns]) for name in METRICS}


def _column(p: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    n, n_positive = len(p), int(positive.sum())
    n_negative = n - n_positive
    order = np.argsort(-p, kind="stable")
    sorted_p, sorted_positive = p[order], positive[order]
    # One point of the curves for each distinct probability: all samples at it and above are called positive.
    last = np.flatnonzero(np.append(sorted_p[1:] != sorted_p[:-1], True))
    hits = np.cumsum(sorted_positive)[last]
    alarms = last + 1 - hits
    said = p >= 0.5
    right, false = int((said & positive).sum()), int((said & ~positive).sum())
    missed = n_positive - right
    recall, specificity = _ratio(right, n_positive), _ratio(n_negative - false, n_negative)
    both = n_positive > 0 and n_negative > 0
    allowed = hits[alarms <= _FALSE_POSITIVES * n_negative]
    inside = np.clip(np.where(positive, p, 1.0 - p), np.finfo(np.float64).tiny, 1.0)
    return {
        "auprc": float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / n_positive) if n_positive else np.nan,
        "base_rate": n_positive / n,
        "accuracy": (right + n_negative - false) / n,
        "majority_accuracy": max(n_positive, n_negative) / n,
        "balanced_accuracy": (recall + specificity) / 2 if both else np.nan,
        "f1": _ratio(2 * right, 2 * right + false + missed),
        "precision": _ratio(right, right + false),
        "recall": recall,
        "recall_at_1_fpr": _ratio(int(allowed.max(initial=0)), n_positive) if both else np.nan,
        "log_loss": float(-np.log(inside).mean()),
        "brier": float(((p - positive) ** 2).mean()),
        "ece": _calibration_error(sorted_p, sorted_positive),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def equal_bins(p: np.ndarray) -> np.ndarray:
    """The bin of each of (n,) sorted probabilities, (n,) int from 0: ten of as many samples as each other, but for ties,
    which lie in one: that of their middle."""
    last = np.flatnonzero(np.append(p[1:] != p[:-1], True))
    first = np.append(0, last[:-1] + 1)
    bins = ((first + last) / 2 / len(p) * _BINS).astype(int)
    return np.repeat(bins, last - first + 1)


def _calibration_error(p: np.ndarray, positive: np.ndarray) -> float:
    """p, positive : sorted by p."""
    error = np.bincount(equal_bins(p), p - positive, _BINS)
    return float(np.abs(error).sum() / len(p))
