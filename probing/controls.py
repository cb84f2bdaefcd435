"""Controls: labels that carry nothing, fitted like the real ones."""

from collections.abc import Sequence

import numpy as np

from hiddenlake.probing.splits import seeded_hash


def shuffle_labels(label: np.ndarray, index: Sequence | np.ndarray, *, n: int = 1, seed: int = 0) -> np.ndarray:
    """Permutations of the labels: what a probe finds in them is what it finds in noise.

    label : (sample,) bool, or the number of the class.  index : (sample,) distinct names, e.g. the task index.

    Which label goes where is a function of (seed, index), whatever the order of the samples. Every
    cell of a grid gets the same permutation, so that the largest of many cells has an honest null.

    Returns (n, sample), of the labels' dtype.
    """
    label = np.asarray(label)
    names = [str(name) for name in index]
    canonical = np.asarray(sorted(range(len(names)), key=names.__getitem__), int)
    out = np.empty((n, len(label)), label.dtype)
    for r in range(n):
        mixed = sorted(canonical, key=lambda i: (seeded_hash(seed, "shuffle", r, names[i]), names[i]))
        out[r, canonical] = label[mixed]
    return out
