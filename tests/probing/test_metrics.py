"""AUROC, DeLong and bootstrap against independent formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from hiddenlake.probing.metrics import auroc, bootstrap_interval, delong_interval, proportion_interval


@settings(max_examples=60)
@given(seed=st.integers(0, 100_000), n=st.integers(2, 80), columns=st.integers(1, 4), values=st.integers(1, 50))
def test_auroc_is_exact_with_ties(seed, n, columns, values):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values, (n, columns)) / values
    positive, use = rng.random((n, columns)) < 0.4, rng.random((n, columns)) < 0.8
    found = auroc(scores, positive, use).auc
    for k in range(columns):
        y, s = positive[use[:, k], k], scores[use[:, k], k]
        if 0 < y.sum() < len(y):
            assert found[k] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        else:
            assert np.isnan(found[k])


def naive_delong(positives, negatives):
    """Placement values by comparing every pair."""
    kernel = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    return kernel.mean(), kernel.mean(1).var(ddof=1) / len(positives) + kernel.mean(0).var(ddof=1) / len(negatives)


@settings(max_examples=40)
@given(seed=st.integers(0, 100_000), n1=st.integers(2, 30), n0=st.integers(2, 30), values=st.integers(2, 40))
def test_delong_is_the_variance_of_the_placements(seed, n1, n0, values):
    rng = np.random.default_rng(seed)
    positives, negatives = rng.integers(1, values + 1, n1), rng.integers(0, values, n0)
    y = np.r_[np.ones(n1, bool), np.zeros(n0, bool)]
    order = rng.permutation(n1 + n0)
    found = auroc(np.r_[positives, negatives][order, None], y[order, None])
    auc, variance = naive_delong(positives, negatives)
    assert found.auc[0] == pytest.approx(auc)
    assert found.variance[0] == pytest.approx(variance, abs=1e-12)


def test_delong_agrees_with_resampling():
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.4
    s = rng.standard_normal(300) + y
    resampled = []
    for _ in range(800):
        chosen = np.r_[rng.choice(np.flatnonzero(y), y.sum()), rng.choice(np.flatnonzero(~y), (~y).sum())]
        resampled.append(roc_auc_score(y[chosen], s[chosen]))
    assert np.sqrt(auroc(s[:, None], y[:, None]).variance[0]) == pytest.approx(np.std(resampled), rel=0.12)


def test_one_sample_of_a_class_has_no_variance():
    found = auroc(np.arange(5.0)[:, None], np.array([0, 0, 0, 0, 1], bool)[:, None])
    assert found.auc[0] == 1.0 and np.isnan(found.variance[0])


def test_the_interval_of_several_folds():
    auc, variance = np.array([[0.7, 0.8], [0.99, 1.0]]), np.array([[0.01, 0.03], [0.02, 0.02]])
    half = 1.959964 * np.sqrt(0.04) / 2
    low, high = delong_interval(auc, variance, trained=False)
    np.testing.assert_allclose([low[0], high[0]], [0.75 - half, 0.75 + half], rtol=1e-6)
    assert high[1] == 1.0
    low, high = delong_interval(auc, variance)
    np.testing.assert_allclose([low[0], high[0]], [0.75 - 2**0.5 * half, 1.0], rtol=1e-6)
    np.testing.assert_allclose(delong_interval(auc[0, :1], variance[0, :1]), [0.7 - 0.195996, 0.7 + 0.195996], rtol=1e-5)


def test_bootstrap_of_single_samples_is_near_delong_and_groups_widen_it():
    rng = np.random.default_rng(1)
    y = rng.random(200) < 0.5
    s = rng.standard_normal(200) + y
    fold = np.zeros(200, int)
    low, high = bootstrap_interval(s, y, fold, np.arange(200), seed=0)
    at = auroc(s[:, None], y[:, None])
    d_low, d_high = delong_interval(at.auc[None], at.variance[None])
    assert [low, high] == pytest.approx([d_low[0], d_high[0]], abs=0.02)
    assert bootstrap_interval(s, y, fold, np.arange(200), seed=0) == (low, high)
    # Each sample four times: the same AUC, but no more evidence.
    four = [np.repeat(a, 4) for a in (s, y, fold, np.arange(200))]
    assert bootstrap_interval(*four, seed=0) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_draws_groups_within_their_folds():
    s, y = np.r_[np.arange(20.0), np.arange(20.0)], np.tile(np.arange(20) >= 10, 2)
    fold = np.repeat([0, 1], 20)
    assert bootstrap_interval(s, y, fold, np.arange(40) // 2, seed=3) == (1.0, 1.0)


def test_the_interval_of_a_share_is_wilsons():
    count, n = np.array([0, 1, 7, 50, 50]), np.array([1, 9, 7, 100, 1000])
    low, high = proportion_interval(count, n)
    for k, total, a, b in zip(count.tolist(), n.tolist(), low, high, strict=True):
        assert (a, b) == pytest.approx(binomtest(k, total).proportion_ci(method="wilson"), abs=1e-12)
