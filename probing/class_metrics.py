"""Class metrics: each class against all others, by tie-exact AUROC, and their mean over classes, with variances.

Shape letters: n samples, c classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True, slots=True)
class ClassAucs:
    """auc, variance : (c,).  macro, macro_variance : of the mean of the classes' AUCs."""

    auc: np.ndarray
    variance: np.ndarray
    macro: float
    macro_variance: float


def class_aucs(scores: np.ndarray, truth: np.ndarray, group: np.ndarray | None = None) -> ClassAucs:
    """AUC of each class against all others.

    scores : (n, c).  truth : (n,) int, the class; every class has at least two samples.
    group : (n,) int, samples that are not independent of each other, or None.

    Variances are sums of squares of what each sample, or each group, contributes to an AUC or to their mean: for one class and
    no groups that is DeLong, DeLong and Clarke-Pearson 1988, with groups Obuchowski 1997 (Biometrics 53).
    """
    n, c = scores.shape
    auc, share = np.empty(c), np.empty((n, c))
    for k in range(c):
        inside = truth == k
        sides = inside, ~inside
        n_in, n_out = (int(side.sum()) for side in sides)
        # How many of the other side lie below each sample, a tie counting half: its rank among all, less that among its own.
        above, below = (rankdata(scores[:, k])[side] - rankdata(scores[side, k]) for side in sides)
        placed = above / n_out, 1.0 - below / n_in
        auc[k] = placed[0].mean()
        for side, size, values in zip(sides, (n_in, n_out), placed, strict=True):
            share[side, k] = (values - values.mean()) / np.sqrt(size * (size - 1))
    macro = share.mean(axis=1)
    if group is not None:
        _, member = np.unique(group, return_inverse=True)
        share = np.stack([np.bincount(member, column) for column in share.T], axis=1)
        macro = np.bincount(member, macro)
    return ClassAucs(auc, (share**2).sum(axis=0), float(auc.mean()), float((macro**2).sum()))
