"""Every metric of held-out probabilities against scikit-learn or its definition, with ties and with one class."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from hiddenlake.probing.classification import METRICS, classify


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000), n=st.integers(2, 120), values=st.integers(2, 200))
def test_they_are_scikit_learns(seed, n, values):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, values + 1, (n, 2)) / values
    y = rng.random(n) < rng.uniform(0.1, 0.9)
    found = classify(p, y)
    assert set(found) == set(METRICS)
    for k in range(2):
        said = p[:, k] >= 0.5
        expected = {
            "accuracy": metrics.accuracy_score(y, said),
            "f1": metrics.f1_score(y, said, zero_division=0.0),
            "precision": metrics.precision_score(y, said, zero_division=0.0),
            "recall": metrics.recall_score(y, said, zero_division=0.0),
            "brier": np.mean((p[:, k] - y) ** 2),
            "base_rate": y.mean(),
            "majority_accuracy": max(y.mean(), 1 - y.mean()),
        }
        if 0 < y.sum() < n:
            expected["auprc"] = metrics.average_precision_score(y, p[:, k])
            expected["balanced_accuracy"] = metrics.balanced_accuracy_score(y, said)
            false, true, _ = metrics.roc_curve(y, p[:, k], drop_intermediate=False)
            expected["recall_at_1_fpr"] = true[false <= 0.01].max()
        for name, value in expected.items():
            assert found[name][k] == pytest.approx(value, abs=1e-12), name


def test_log_loss_is_finite_only_where_no_sample_was_impossible():
    y = np.array([True, False, True])
    p = np.array([[0.9, 1.0], [0.2, 0.2], [0.6, 0.5]])
    found = classify(p, y)["log_loss"]
    assert found == pytest.approx([metrics.log_loss(y, p[:, k]) for k in range(2)])
    assert classify(np.array([[0.0]]), np.array([True]))["log_loss"][0] > 700


def test_the_order_of_the_samples_changes_nothing():
    rng = np.random.default_rng(0)
    p, y = rng.integers(0, 8, (300, 3)) / 8, rng.random(300) < 0.3
    mixed = rng.permutation(300)
    first, second = classify(p, y), classify(p[mixed], y[mixed])
    for name in METRICS:
        assert first[name] == pytest.approx(second[name], abs=1e-14), name


def test_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    honest = classify(p[:, None], rng.random(len(p)) < p)["ece"][0]
    sure = classify(np.where(p > 0.5, 1.0, 0.0)[:, None], rng.random(len(p)) < p)["ece"][0]
    assert honest < 0.01
    assert sure == pytest.approx(0.25, abs=0.01)
    # ten bins of equal size: here each holds one probability
    p = np.repeat(np.arange(10) / 10, 7)
    y = np.tile([1, 0, 0, 0, 0, 0, 0], 10).astype(bool)
    assert classify(p[:, None], y)["ece"][0] == pytest.approx(np.abs(np.arange(10) / 10 - 1 / 7).mean())


def test_one_class_only():
    found = classify(np.array([[0.2], [0.7]]), np.array([False, False]))
    assert found["accuracy"][0] == 0.5 and found["majority_accuracy"][0] == 1.0
    assert np.isnan([found[name][0] for name in ("auprc", "balanced_accuracy", "recall_at_1_fpr")]).all()
