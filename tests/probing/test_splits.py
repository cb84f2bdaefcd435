"""Folds and shuffles follow the seed and the names, never the order of the samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.controls import shuffle_labels
from hiddenlake.probing.splits import make_folds


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), n=st.integers(60, 200), n_groups=st.integers(30, 200), cv=st.integers(2, 5))
def test_folds_hold_whole_groups_whatever_the_order(seed, n, n_groups, cv):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, n_groups, n)
    y = np.arange(n) % 3 == 0
    fold = make_folds(y, n_folds=cv, groups=group, seed=seed)
    assert all(len(set(fold[group == g])) == 1 for g in set(group))
    assert all(0 < y[fold == f].sum() < (fold == f).sum() for f in range(cv))
    order = rng.permutation(n)
    np.testing.assert_array_equal(make_folds(y[order], n_folds=cv, groups=group[order], seed=seed), fold[order])


def test_folds_are_stratified_and_even():
    y = np.arange(500) % 10 < 3
    fold = make_folds(y, n_folds=5, groups=np.arange(500), seed=1)
    assert np.bincount(fold).tolist() == [100] * 5
    assert np.bincount(fold[y]).tolist() == [30] * 5


def test_another_seed_gives_other_folds():
    y = np.arange(100) % 2 == 0
    one, two = (make_folds(y, n_folds=5, groups=np.arange(100), seed=s) for s in (0, 1))
    assert (one != two).mean() > 0.5


def test_folds_that_cannot_be_are_refused():
    y = np.arange(20) % 2 == 0
    with pytest.raises(ProbeError, match=r"3 groups cannot fill 5 folds: use cv=3 or fewer"):
        make_folds(y, n_folds=5, groups=np.arange(20) % 3)
    with pytest.raises(ProbeError, match=r"all 20 samples are one group \(paris\)"):
        make_folds(y, n_folds=5, groups=["paris"] * 20)
    with pytest.raises(ProbeError, match=r"fold \d of 5 has no positive sample: the 3 positive samples lie in 3 of 20"):
        make_folds(np.arange(20) < 3, n_folds=5, groups=np.arange(20))
    with pytest.raises(ProbeError, match=r"all 20 samples are of one class \(0 positive, 20 negative\)"):
        make_folds(np.zeros(20, bool), n_folds=5, groups=np.arange(20))
    with pytest.raises(ProbeError, match="cv of at least 2"):
        make_folds(y, n_folds=1, groups=np.arange(20))


def test_shuffles_keep_the_classes_and_follow_the_names():
    rng = np.random.default_rng(0)
    y, names = rng.random(300) < 0.3, np.arange(300)
    shuffled = shuffle_labels(y, names, n=3, seed=5)
    assert (shuffled.sum(axis=1) == y.sum()).all()
    assert len({row.tobytes() for row in [y, *shuffled]}) == 4
    order = rng.permutation(300)
    np.testing.assert_array_equal(shuffle_labels(y[order], names[order], n=3, seed=5), shuffled[:, order])
    assert abs(np.corrcoef(y, shuffled[0])[0, 1]) < 0.15


def test_shuffled_groups_keep_their_labels_together():
    group = np.repeat(np.arange(30), 4)
    y = np.random.default_rng(0).random(30)[group] < 0.4
    names = np.arange(120)
    shuffled = shuffle_labels(y, names, groups=group, n=5, seed=3)
    assert (shuffled.reshape(5, 30, 4) == shuffled.reshape(5, 30, 4)[..., :1]).all()
    assert (shuffled.sum(axis=1) == y.sum()).all() and not (shuffled == y).all(axis=1).any()
    order = np.random.default_rng(1).permutation(120)
    again = shuffle_labels(y[order], names[order], groups=group[order], n=5, seed=3)
    np.testing.assert_array_equal(again, shuffled[:, order])
