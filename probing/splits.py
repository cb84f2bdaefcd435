"""Splits: stratified folds of whole groups that follow the seed and the names, never the order of arrival."""

import hashlib
from collections.abc import Sequence

import numpy as np

from hiddenlake.cache.errors import ProbeError


def make_folds(label: np.ndarray, *, n_folds: int = 5, groups: Sequence | np.ndarray, seed: int = 0) -> np.ndarray:
    """Fold of each sample, as in StratifiedGroupKFold: whole groups, all classes spread evenly.

    label : (sample,) bool, or int from 0 to the number of classes - 1.  groups : (sample,) names; the samples of a name share a fold.

    Groups are dealt largest first, then by a hash of (seed, name), each to the fold that holds least
    of its classes. The result depends on the set of samples only, so that two captures of one run
    have the same folds.

    Returns (sample,) int, 0 to n_folds - 1.

    Raises ProbeError when there are fewer groups than folds, or a fold would lack a class.
    """
    label = np.asarray(label)
    kinds = ["negative", "positive"] if label.dtype == bool else [f"class {k}" for k in range(label.max(initial=1) + 1)]
    if n_folds < 2:
        raise ProbeError(f"{n_folds} folds cannot hold samples out: expected cv of at least 2")
    names, member = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    if len(member) != len(label):
        raise ProbeError(f"{len(member)} groups do not match {len(label)} labels: give one group a sample")
    if len(names) < n_folds:
        raise ProbeError(
            f"{len(names)} groups cannot fill {n_folds} folds: use cv={len(names)} or fewer, or other groups"
            if len(names) > 1
            else f"all {len(label)} samples are one group ({names[0] if len(names) else 'none'}): name other groups"
        )
    counts = np.zeros((len(names), len(kinds)))
    np.add.at(counts, (member, label.astype(int)), 1)
    totals = counts.sum(axis=0)
    if label.dtype == bool and not totals.all():
        raise ProbeError(
            f"all {len(label)} samples are of one class ({int(totals[1])} positive, {int(totals[0])} negative): "
            f"a probe needs both"
        )
    order = sorted(range(len(names)), key=lambda g: (-counts[g].sum(), seeded_hash(seed, names[g]), names[g]))
    held = np.zeros((n_folds, len(kinds)))
    fold_of = np.zeros(len(names), int)
    for g in order:
        # What the sum of squared shares of each class would grow by; ties go to the emptiest fold.
        crowd = (held * counts[g] / totals**2).sum(axis=1)
        fold = min(range(n_folds), key=lambda f: (crowd[f], held[f].sum(), f))
        held[fold] += counts[g]
        fold_of[g] = fold
    lacking = np.argwhere(held == 0)
    if len(lacking):
        fold, side = lacking[0]
        kind = kinds[side]
        raise ProbeError(
            f"fold {fold} of {n_folds} has no {kind} sample: the {int(totals[side])} {kind} samples lie in "
            f"{int((counts[:, side] > 0).sum())} of {len(names)} groups; use fewer folds or other groups"
        )
    return fold_of[member]


def seeded_hash(*parts: object) -> bytes:
    """16 bytes that are a function of the parts alone, whatever the process."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
