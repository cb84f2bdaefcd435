"""Softmax against scikit-learn's multinomial newton-cg and the binary solver, and its certificate against the true gap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from hiddenlake.probing.solvers import multinomial, softmax
from hiddenlake.probing.solvers.multinomial import Models, certify_softmax
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.problem import make_problem
from hiddenlake.probing.solvers.softmax import solve_softmax


def rows(n, d, c, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-1, 1, d) + 3 * rng.standard_normal(
        (n, 2)
    ) @ rng.standard_normal((2, d))
    y = (X[:, np.arange(c) % d] / X[:, np.arange(c) % d].std(axis=0) + rng.gumbel(size=(n, c))).argmax(axis=1)
    y[: 2 * c] = np.arange(2 * c) % c
    return X, y


def problem(X, ys, c, C, *, train=None, fold=None, sets=None, weight=None, scale="feature"):
    """Models of C and label set and fold, c columns each."""
    ys, C = np.atleast_2d(ys), np.atleast_1d(C)
    k = len(C)
    fold, sets = (np.zeros(k, int) if one is None else np.asarray(one) for one in (fold, sets))
    return make_problem(
        X, np.stack([y == j for y in ys for j in range(c)]), np.ones((1, len(X))) if train is None else train,
        C=np.repeat(C, c), fold=np.repeat(fold, c), label_set=(c * sets[:, None] + np.arange(c)).ravel(), scale=scale,
        class_weight=None if weight is None else np.tile(np.stack([np.ones(c), weight], axis=1), (k, 1)),
    )  # fmt: skip


def objective(Z, y, W, b, s):
    z = Z @ W + b
    return (s * (np.logaddexp.reduce(z, axis=1) - z[np.arange(len(y)), y])).sum() + 0.5 * (W * W).sum()


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0], ids="C={:g}".format)
@pytest.mark.parametrize(
    ("n", "d", "c"), [(200, 12, 3), (60, 90, 4), (150, 6, 7)], ids=["tall", "wide", "seven classes"]
)
def test_reaches_the_objective_of_newton_cg(n, d, c, C):
    X, y = rows(n, d, c)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    found = solve_softmax(problem(X, y, c, C), c, tol=1e-9)
    theirs = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=2000).fit(Z, y)
    ours = objective(Z, y, found.coef, found.intercept, C)
    assert found.converged.all() and ours == pytest.approx(found.objective[0], rel=1e-12)
    assert ours == pytest.approx(objective(Z, y, theirs.coef_.T, theirs.intercept_, C), rel=1e-8)


def test_weights_of_samples_and_classes_are_scikit_learns():
    X, y = rows(150, 5, 3)
    rng = np.random.default_rng(1)
    weight = rng.random(150) * (rng.random(150) < 0.8)
    inside = weight > 0
    Z = (X - X[inside].mean(axis=0)) / X[inside].std(axis=0)
    of_class = np.array([0.5, 2.0, 1.3])
    found = solve_softmax(problem(X, y, 3, 0.7, train=weight[None], weight=of_class), 3, tol=1e-10)
    theirs = LogisticRegression(C=0.7, solver="newton-cg", tol=1e-10, class_weight=dict(enumerate(of_class)))
    theirs.fit(Z[inside], y[inside], sample_weight=weight[inside])
    s = 0.7 * weight * of_class[y]
    assert found.objective[0] == pytest.approx(objective(Z, y, theirs.coef_.T, theirs.intercept_, s), rel=1e-8)


def test_two_classes_are_the_binary_problem_of_twice_the_strength():
    X, y = rows(80, 10, 2)
    two = solve_softmax(problem(X, y, 2, 0.3), 2, tol=1e-10)
    one = np.zeros(1, int)
    binary = make_problem(X, y[None] == 1, np.ones((1, 80)), C=np.array([0.6]), fold=one, label_set=one)
    assert two.objective[0] == pytest.approx(0.5 * solve_newton(binary, 1e-10).objective[0], rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(120, 10), (30, 60)], ids=["tall", "wide"])
def test_the_certificate_bounds_the_truth_of_any_weights(n, d):
    X, y = rows(n, d, 3)
    at = problem(X, y, 3, 0.7)
    best = solve_softmax(at, 3, tol=1e-11)
    models = Models.of(at.columns(0, torch.arange(3)), 3)
    rng = np.random.default_rng(2)
    for spread in (0.0, 1e-3, 0.1, 3.0):
        coef = torch.as_tensor(best.coef + spread * rng.standard_normal(best.coef.shape))
        reached, bound, intercept = certify_softmax(models, coef, torch.as_tensor(rng.standard_normal((1, 3))))
        gap = float(reached) - best.objective[0]
        assert -1e-9 * best.objective[0] <= gap <= float(bound) + 1e-9 * best.objective[0]
        assert abs(float(intercept.sum())) < 1e-9


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000), n=st.integers(16, 50), d=st.integers(1, 40), c=st.integers(3, 5),
    log_C=st.floats(-4, 3), scale=st.sampled_from(["none", "rms", "feature"]), tol=st.sampled_from([1e-4, 1e-8]),
)  # fmt: skip
def test_every_model_reaches_its_tolerance(seed, n, d, c, log_C, scale, tol):
    X, y = rows(n, d, c, seed)
    found = solve_softmax(problem(X, y, c, 10.0**log_C, scale=scale), c, tol)
    assert found.converged.all() and (found.gap_bound <= tol * found.objective).all()


def test_masks_and_paths_equal_fits_on_the_subsets():
    X, y = rows(120, 8, 3)
    ys = np.stack([y, np.random.default_rng(1).permutation(y)])
    train = (np.arange(120) % 2 != np.arange(2)[:, None]).astype(float)
    C, fold, sets = (axis.ravel() for axis in np.meshgrid([1.0, 0.01], np.arange(2), np.arange(2), indexing="ij"))
    together = solve_softmax(problem(X, ys, 3, C, train=train, fold=fold, sets=sets), 3, tol=1e-10)
    assert together.converged.all() and together.coef.shape == (8, 24)
    for k in range(8):
        inside = train[fold[k]] > 0
        alone = solve_softmax(problem(X[inside], ys[sets[k]][inside], 3, C[k]), 3, tol=1e-10)
        assert together.objective[k] == pytest.approx(alone.objective[0], rel=1e-9)
        np.testing.assert_allclose(together.coef[:, 3 * k : 3 * k + 3], alone.coef, atol=1e-4)


def test_a_solver_that_is_stopped_says_so(monkeypatch):
    monkeypatch.setattr(softmax, "_MAX_NEWTON", 1)
    X, y = rows(100, 30, 4)
    found = solve_softmax(problem(X, y, 4, 10.0), 4, tol=1e-9)
    assert not found.converged.any() and found.gap_bound[0] > 1e-9 * found.objective[0]


def test_what_float32_cannot_is_finished_in_float64():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((200, 40)) + 1e4 * rng.standard_normal((200, 3)) @ rng.standard_normal((3, 40))
    y = np.arange(200) % 3
    found = solve_softmax(problem(X, y, 3, 10.0, scale="none"), 3, tol=1e-9)
    assert found.converged.all()


def test_the_intercepts_are_found_where_newton_alone_overshoots():
    scores = torch.tensor([[[-40.0, 0, 5]], [[45.0, 3, 4]], [[0, 25.0, -35]], [[1, 2, 3]]], dtype=torch.float64)
    truth = torch.tensor([0, 1, 2, 2])[:, None, None]
    models = Models(None, torch.ones(4, 1, dtype=torch.float64), truth, 3)
    at = models.fit_intercepts(scores, torch.tensor([[500.0, 0.0, -500.0]], dtype=torch.float64))
    assert float(at.residual.sum(0).abs().max()) < 1e-9


def test_a_row_has_one_class():
    X, y = rows(30, 4, 3)
    at = make_problem(
        X,
        np.stack([y == 0, y == 1, y >= 1]),
        np.ones((1, 30)),
        C=np.ones(3),
        fold=np.zeros(3, int),
        label_set=np.arange(3),
    )
    with pytest.raises(ValueError, match="another number of classes than one"):
        solve_softmax(at, 3)


def test_intercepts_that_are_not_the_best_are_no_certificate(monkeypatch):
    X, y = rows(60, 4, 3)
    at = problem(X, y, 3, 0.7)
    best = solve_softmax(at, 3, tol=1e-9)
    monkeypatch.setattr(multinomial, "_INTERCEPT_STEPS", 1)
    models = Models.of(at.columns(0, torch.arange(3)), 3)
    _, bound, _ = certify_softmax(
        models, torch.as_tensor(best.coef), torch.full((1, 3), 2.0, dtype=torch.float64) ** torch.arange(3)
    )
    assert float(bound) == np.inf
