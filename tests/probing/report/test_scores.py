"""Curves of held-out probabilities against the metrics that a grid has, and texts that are cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.probing.classification import classify
from hiddenlake.probing.metrics import auroc
from hiddenlake.probing.report.examples import shortened
from hiddenlake.probing.report.scores import reliability, roc, spread


def draw(seed: int, n: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, few of them distinct, and labels of both classes."""
    rng = np.random.default_rng(seed)
    p = rng.integers(0, values, n) / values
    positive = rng.random(n) < p
    positive[:2] = True, False
    return p, positive


@given(seed=st.integers(0, 10_000), n=st.integers(2, 300), values=st.integers(1, 1000))
def test_the_curves_are_the_metrics(seed, n, values):
    p, positive = draw(seed, n, values)
    curve = roc(p, positive)
    assert np.trapezoid(curve.true, curve.false) == pytest.approx(
        auroc(p[:, None], positive[:, None]).auc[0], abs=1e-12
    )
    assert (curve.false[0], curve.true[0], curve.false[-1], curve.true[-1]) == (0, 0, 1, 1)
    assert len(curve.true) == len(np.unique(p)) + 1
    bins = reliability(p, positive)
    assert bins.error == pytest.approx(classify(p[:, None], positive)["ece"][0], abs=1e-12)
    assert bins.n.sum() == n and (np.diff(bins.mean) > 0).all()
    assert ((bins.lo <= bins.share) & (bins.share <= bins.hi)).all()
    bars = spread(p, positive)
    assert (bars.positive.sum(), bars.negative.sum()) == (positive.sum(), n - positive.sum())


def test_a_curve_of_very_many_points_is_thinned_and_stays():
    p, positive = draw(0, 100_000, 10**9)
    curve = roc(p, positive)
    assert len(curve.true) < 410 and np.isinf(curve.threshold[0])
    assert np.trapezoid(curve.true, curve.false) == pytest.approx(auroc(p[:, None], positive[:, None]).auc[0], abs=1e-4)
    for false, true, threshold in list(zip(curve.false, curve.true, curve.threshold, strict=True))[1::40]:
        called = p >= threshold
        assert (called[positive].mean(), called[~positive].mean()) == (pytest.approx(true), pytest.approx(false))


def test_a_long_text_says_that_it_was_cut():
    assert shortened("x" * 4000) == "x" * 4000
    text = "a" * 3000 + "b" * 5000 + "c" * 3000
    cut = shortened(text)
    assert len(cut) < 4100 and cut.startswith("aaa") and cut.endswith("ccc") and "7000 characters are left out" in cut
