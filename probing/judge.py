"""Judge: what the probes of one cell say of the samples that they did not see, and how well that ranks them.

Shape letters: n samples, d features, C values of C, F folds, K columns.
"""

from dataclasses import dataclass

import numpy as np

from hiddenlake.probing.equal_rows import first_equal_row
from hiddenlake.probing.metrics import auroc
from hiddenlake.probing.solve import Solved
from hiddenlake.probing.solvers.certificate import certified_auc


@dataclass(frozen=True, slots=True)
class Judged:
    """auc, variance : (K,) of each column on its held-out samples, the variance being DeLong's.

    Of the real labels: score, (n, C), each sample's log-odds by the probe that did not see it; certified_lo and
    certified_hi, (F, C), between which the optimum's auc lies; and inner_auc, (C, F, F), on the second fold by the probe
    that saw neither it nor the first, NaN where there is none.
    """

    auc: np.ndarray
    variance: np.ndarray
    score: np.ndarray
    certified_lo: np.ndarray
    certified_hi: np.ndarray
    inner_auc: np.ndarray


def judge(solved: Solved, X: np.ndarray) -> Judged:
    """X : (n, d), the activations that were fitted."""
    same = first_equal_row(X)
    n_values, n_folds, _ = solved.shape
    auc, variance = np.full((2, solved.inner.start), np.nan)
    score = np.empty((len(solved.fold), n_values))
    certified = np.zeros((2, n_folds, n_values))
    inner_auc = np.full((n_values, n_folds, n_folds), np.nan)
    for mask, folds in enumerate(solved.out):
        columns = np.flatnonzero(solved.mask == mask)
        for f in np.flatnonzero(folds):
            rows = np.flatnonzero(solved.fold == f)
            held = solved.problem.coordinates(mask, rows)
            # Equal rows must tie, and a matrix product may round them differently: each takes the score of its first.
            _, first, again = np.unique(same[rows], return_index=True, return_inverse=True)
            found = (held @ solved.solution.coef[:, columns])[first[again]] + solved.solution.intercept[columns]
            measured = auroc(found, solved.labels[solved.label_set[columns]][:, rows].T)
            if mask >= n_folds:
                (other,) = np.flatnonzero(folds & (np.arange(n_folds) != f))
                inner_auc[solved.C[columns], other, f] = measured.auc
                continue
            auc[columns], variance[columns] = measured.auc, measured.variance
            # The objective is 1 - l1_ratio strongly convex: with an l1 penalty alone, no distance is bounded.
            with np.errstate(divide="ignore", invalid="ignore"):
                radius = np.sqrt(2.0 * solved.solution.gap_bound[columns] / (1.0 - solved.problem.l1_ratio))
            real = solved.label_set[columns] == 0
            of_labels, found = columns[real], found[:, real]
            score[np.ix_(rows, solved.C[of_labels])] = found
            certified[:, f, solved.C[of_labels]] = certified_auc(
                found, solved.labels[0, rows], held, same[rows], radius[real]
            )
    return Judged(auc, variance, score, *certified, inner_auc)
