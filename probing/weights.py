"""Weights: what each sample, and each class, counts in a fit."""

from collections.abc import Mapping, Sequence

import numpy as np

from hiddenlake.cache.errors import ProbeError

ClassWeight = str | Mapping[bool, float] | None


def check_sample_weight(values: Sequence | np.ndarray, positive: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(sample,) float64 weights of samples, checked.

    values : (sample,).  positive : (sample,) bool.  kept : (sample,) bool, the samples that count.

    Raises ProbeError for a kept weight that is negative or not finite, and for a class whose weights are all 0.
    """
    weight = np.asarray(values, np.float64)
    if weight.shape != kept.shape:
        raise ProbeError(
            f"sample_weight has the shape {weight.shape}: expected one for each of the {len(kept)} samples"
        )
    bad = kept & ~(np.isfinite(weight) & (weight >= 0))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ProbeError(f"sample_weight is {weight[first]} for sample {first}: expected finite weights of at least 0")
    for name, side in (("positive", kept & positive), ("negative", kept & ~positive)):
        if side.any() and not weight[side].any():
            raise ProbeError(f"all {int(side.sum())} {name} samples have the weight 0: a probe needs both classes")
    return np.where(kept, weight, 0.0)


def check_class_weight(class_weight: ClassWeight) -> ClassWeight:
    """The same, in bool and float. Raises ProbeError for what is not None, `balanced`, or positive weights by False and True."""
    if class_weight is None or class_weight == "balanced":
        return class_weight
    if not isinstance(class_weight, Mapping):
        raise ProbeError(f"class_weight is {class_weight!r}: expected None, `balanced`, or weights by False and True")
    for key, weight in class_weight.items():
        if key not in (False, True) or not (np.isfinite(weight) and weight > 0):
            raise ProbeError(f"class_weight gives {key!r} {weight!r}: expected a weight above 0 by False or True")
    return {bool(key): float(weight) for key, weight in sorted(class_weight.items())}


def column_class_weights(
    class_weight: ClassWeight, labels: np.ndarray, train: np.ndarray, *, fold: np.ndarray, label_set: np.ndarray
) -> np.ndarray | None:
    """(K, 2) weights of each column's negative and positive class, or None where they are 1.

    labels : (L, n) bool.  train : (F, n) weights, 0 outside a fold's training rows.  fold, label_set : (K,).

    `balanced` gives both classes half of what the training rows weigh in all, as in scikit-learn; of shuffled labels too.
    """
    if class_weight is None:
        return None
    if class_weight != "balanced":
        return np.tile([class_weight.get(False, 1.0), class_weight.get(True, 1.0)], (len(fold), 1))
    total, positive = train.sum(axis=1)[fold], (train @ labels.T)[fold, label_set]
    return np.stack([total / (2 * (total - positive)), total / (2 * positive)], axis=1)
