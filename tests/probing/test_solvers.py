"""Solvers against scikit-learn's newton-cholesky, and the certificate against the true gap."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.solvers import newton, spaces
from hiddenlake.probing.solvers.certificate import Intercepts, certify
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.problem import Columns, make_problem
from hiddenlake.probing.solvers.scikit import solve_scikit

RNG = np.random.default_rng


def one_column(X, y, C=1.0, scale="none", train=None):
    train = np.ones(len(y), bool) if train is None else train
    return make_problem(
        X, y[None], train[None], C=np.array([C]), fold=np.array([0]), label_set=np.array([0]), scale=scale
    )


def objective(X, y, w, b, C):
    sign = np.where(y, 1.0, -1.0)
    return C * np.logaddexp(0.0, -sign * (X @ w + b)).sum() + 0.5 * w @ w


def noisy(n, d, seed=0):
    rng = RNG(seed)
    X = rng.standard_normal((n, d))
    return X, X[:, 0] + rng.standard_normal(n) > 0


def separable():
    X, _ = noisy(120, 8)
    return X, X[:, 0] > 0


def duplicated():
    X, y = noisy(30, 8)
    return np.repeat(X, 4, axis=0), np.repeat(y, 4)


def constant_feature():
    X, y = noisy(120, 8)
    X[:, 3], X[:, 5] = 7.1, 0.0
    return X, y


def badly_scaled():
    X, y = noisy(200, 12)
    rng = RNG(1)
    return X * 10.0 ** rng.uniform(-2, 2, 12) + 10.0 ** rng.uniform(-1, 2, 12), y


def wide():
    return noisy(40, 90)


CASES = {f.__name__: f for f in (separable, duplicated, constant_feature, badly_scaled, wide)}


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0], ids="C={:g}".format)
@pytest.mark.parametrize("case", CASES)
def test_reaches_the_objective_of_newton_cholesky(case, C):
    X, y = CASES[case]()
    solution = solve_newton(one_column(X, y, C), tol=1e-10)
    assert solution.converged.all()
    centred = X - X.mean(axis=0)
    theirs = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(centred, y)
    best = objective(centred, y, theirs.coef_[0], theirs.intercept_[0], C)
    ours = objective(centred, y, solution.coef[:, 0], solution.intercept[0], C)
    assert ours == pytest.approx(solution.objective[0], rel=1e-12)
    assert abs(ours - best) <= 1e-8 * best
    np.testing.assert_allclose(solution.coef[:, 0], theirs.coef_[0], atol=1e-3 * np.abs(theirs.coef_).max())


@pytest.mark.parametrize("case", CASES)
def test_the_certificate_bounds_the_gap_of_any_weights(case):
    X, y = CASES[case]()
    problem = one_column(X, y, 1.0)
    best = solve_newton(problem, tol=1e-12)
    rng = RNG(2)
    for spread in (0.0, 1e-3, 0.1, 3.0):
        coef = best.coef + spread * rng.standard_normal(best.coef.shape)
        at = certify(problem, coef, rng.standard_normal(1))
        gap = float(at.objective[0]) - best.objective[0]
        assert -1e-9 * best.objective[0] <= gap <= float(at.gap_bound[0]) + 1e-9 * best.objective[0]


def test_the_certificate_is_the_fenchel_gap():
    X, y = noisy(60, 5)
    problem = one_column(X, y, 0.7)
    coef = RNG(3).standard_normal((5, 1))
    at = certify(problem, coef, np.zeros(1))
    z = (X - X.mean(axis=0)) @ coef[:, 0] + float(at.intercept[0])
    sign = np.where(y, 1.0, -1.0)
    p = 1.0 / (1.0 + np.exp(sign * z))
    alpha = 0.7 * p
    assert abs((alpha * sign).sum()) < 1e-10  # dual feasible
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    dual = 0.7 * entropy.sum() - 0.5 * np.sum(((X - X.mean(axis=0)).T @ (alpha * sign)) ** 2)
    assert float(at.objective[0]) - dual == pytest.approx(float(at.gap_bound[0]), rel=1e-9)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(12, 60),
    d=st.integers(1, 40),
    log_C=st.floats(-6, 6),
    scale=st.sampled_from(["none", "rms", "feature"]),
    tol=st.sampled_from([1e-4, 1e-8]),
)
def test_every_column_reaches_its_tolerance(seed, n, d, log_C, scale, tol):
    rng = RNG(seed)
    X = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-2, 2, d) + rng.standard_normal(d)
    y = rng.random(n) < 0.5
    y[:2], y[2:4] = True, False
    solution = solve_newton(one_column(X, y, 10.0**log_C, scale), tol)
    assert solution.converged.all()
    assert (solution.gap_bound <= tol * solution.objective).all()


def test_masks_equal_fits_on_the_subsets():
    X, y = noisy(150, 10)
    labels = np.stack([y, RNG(1).permutation(y)])
    fold_of = np.arange(150) % 3
    train = np.stack([fold_of != f for f in range(3)])
    C, fold, label_set = (axis.ravel() for axis in np.meshgrid([0.01, 1.0], np.arange(3), np.arange(2), indexing="ij"))
    for scale in ("none", "rms", "feature"):
        together = solve_newton(
            make_problem(X, labels, train, C=C, fold=fold, label_set=label_set, scale=scale), tol=1e-12
        )
        assert together.converged.all()
        for column in range(len(C)):
            inside = train[fold[column]]
            alone = solve_newton(one_column(X[inside], labels[label_set[column]][inside], C[column], scale), tol=1e-12)
            np.testing.assert_allclose(together.objective[column], alone.objective[0], rtol=1e-9)
            np.testing.assert_allclose(together.coef[:, column], alone.coef[:, 0], atol=1e-5)


def test_exact_newton_finishes_what_cg_leaves(monkeypatch):
    monkeypatch.setattr(spaces, "_MAX_STEPS", 1)
    monkeypatch.setattr(newton, "_MAX_NEWTON", 2)
    for case in (badly_scaled, wide, separable):
        X, y = case()
        solution = solve_newton(one_column(X, y, 10.0), tol=1e-9)
        assert solution.converged.all() and solution.n_iter[0] > 2


def test_a_solver_that_is_stopped_says_so(monkeypatch):
    monkeypatch.setattr(newton, "_MAX_NEWTON", 1)
    monkeypatch.setattr(newton, "_MAX_EXACT", 1)
    X, y = badly_scaled()
    solution = solve_newton(one_column(X, y, 10.0), tol=1e-9)
    assert not solution.converged.any()
    assert solution.gap_bound[0] > 1e-9 * solution.objective[0]


def ill_conditioned(n, d):
    """A few directions a million times as long as the others, as massive activations are."""
    rng = RNG(3)
    X = rng.standard_normal((n, d)) + 1e4 * rng.standard_normal((n, 3)) @ rng.standard_normal((3, d))
    return X, rng.random(n) < 0.5


@pytest.mark.parametrize(("n", "d"), [(300, 60), (60, 300)], ids=["primal", "dual"])
def test_float32_that_breaks_down_is_noticed_and_mended(monkeypatch, n, d):
    X, y = ill_conditioned(n, d)
    problem = one_column(X, y, 100.0)
    monkeypatch.setattr(newton, "_LADDER", (torch.float32,))
    monkeypatch.setattr(newton, "_MAX_EXACT", 0)
    broken = solve_newton(problem, tol=1e-10)
    assert not broken.converged.any() and (broken.gap_bound > 1e-10 * broken.objective).all()
    monkeypatch.undo()
    assert solve_newton(problem, tol=1e-10).converged.all()


def test_scikit_agrees_under_the_same_certificate():
    X, y = badly_scaled()
    problem = one_column(X, y, 0.1, "feature")
    ours, theirs = solve_newton(problem, 1e-9), solve_scikit(problem, 1e-9)
    assert theirs.converged.all()
    np.testing.assert_allclose(ours.objective, theirs.objective, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept, theirs.intercept, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d"), [(40, 7), (12, 30)], ids=["primal", "dual"])
@pytest.mark.parametrize("c", [1e-6, 0.01, 3.0])
def test_a_step_solves_newtons_system(n, d, c, dtype):
    g = torch.Generator().manual_seed(0)
    A = torch.randn(n, d, generator=g, dtype=torch.float64)
    D, residual = (
        torch.rand(n, 3, generator=g, dtype=torch.float64),
        torch.randn(n, 3, generator=g, dtype=torch.float64),
    )
    space = spaces.make_space(A.to(dtype), 1)
    assert isinstance(space, spaces.Primal if d <= n else spaces.Dual)
    state = torch.randn(d if d <= n else n, 3, generator=g, dtype=torch.float64)
    handle, norm = space.gradient(state, residual.to(dtype))
    w = state if d <= n else A.T @ state
    gradient = w + A.T @ residual
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(norm.double(), gradient.square().sum(0), **close)
    torch.testing.assert_close(space.scores(state), A @ w, **close)
    torch.testing.assert_close(space.square(state, A @ w), w.square().sum(0), **close)
    accuracy = torch.full((3,), 1e-5 if dtype == torch.float32 else 1e-12, dtype=dtype)
    step, slope = space.solve(handle, spaces.Curvature.of(D.to(dtype)), c, accuracy)
    for k in range(3):
        without = torch.diag(D[:, k]) - torch.outer(D[:, k], D[:, k]) / D[:, k].sum()
        expected = -torch.linalg.solve(torch.eye(d, dtype=torch.float64) + A.T @ without @ A, gradient[:, k])
        found = step.state[:, k] if d <= n else A.T @ step.state[:, k]
        torch.testing.assert_close(found, expected, **close)
        torch.testing.assert_close(step.scores[:, k], A @ expected, **close)
        torch.testing.assert_close(slope[k], gradient[:, k] @ expected, **close)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_are_fitted_as_they_are_stored(dtype):
    X, y = noisy(80, 6)
    X = (100 * X + 300).astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    problem = one_column(X, y, 0.1, "feature")
    assert str(problem.X.dtype) == f"torch.{dtype}"
    assert problem.X.untyped_storage().data_ptr() == X.ctypes.data, "a copy"
    before = X.copy()
    stored, wide = (solve_newton(p, 1e-11) for p in (problem, one_column(X.astype(np.float64), y, 0.1, "feature")))
    np.testing.assert_allclose(stored.coef, wide.coef, rtol=1e-5, atol=1e-7)
    assert (X == before).all()


def test_weights_of_samples_and_classes_are_scikit_learns():
    X, y = noisy(120, 5)
    weight = RNG(1).random(120) * (RNG(2).random(120) < 0.8)
    balance = {0: 0.7, 1: 3.0}
    problem = make_problem(
        X, y[None], weight[None], C=np.array([0.3]), fold=np.array([0]), label_set=np.array([0]), scale="none",
        class_weight=np.array([[0.7, 3.0]]),
    )  # fmt: skip
    for solve in (solve_newton, solve_scikit):
        found = solve(problem, 1e-12)
        model = LogisticRegression(C=0.3, solver="newton-cholesky", tol=1e-12, class_weight=balance)
        model.fit(X - X.mean(axis=0), y, sample_weight=weight)
        np.testing.assert_allclose(found.coef[:, 0], model.coef_[0], rtol=1e-5)
        np.testing.assert_allclose(found.intercept, model.intercept_, rtol=1e-4, atol=1e-6)


def test_the_intercept_is_found_where_newton_alone_overshoots():
    scores = torch.tensor([[-800.0], [-500.0], [300.0], [900.0]], dtype=torch.float64)
    positive = torch.tensor([[False], [True], [False], [True]])
    columns = Columns(None, torch.ones(4, dtype=torch.float64), positive, torch.ones(2, 1, dtype=torch.float64))
    at = Intercepts.of(columns, torch.float64).fit(scores, torch.tensor([5e3], dtype=torch.float64)).at
    assert abs(float(at.residual.sum())) < 1e-9


def test_scales_are_those_of_the_training_rows():
    X, y = noisy(60, 4)
    X[:, 2] = 3.3
    train = np.arange(60) < 40
    unit = one_column(X, y, scale="feature", train=train).unit[0].numpy()
    expected = 1.0 / X[train].std(axis=0)[[0, 1, 3]]
    np.testing.assert_allclose(unit[[0, 1, 3]], expected, rtol=1e-10)
    assert unit[2] == 0.0
    rms = one_column(X, y, scale="rms", train=train).unit[0].numpy()
    np.testing.assert_allclose(rms[0], 1.0 / np.sqrt(X[train].var(axis=0).mean()), rtol=1e-10)


def test_bad_problems_are_refused():
    X, y = noisy(20, 3)
    with pytest.raises(ProbeError, match="one class only"):
        one_column(X, np.zeros(20, bool))
    with pytest.raises(ProbeError, match="unknown scale 'minmax': expected one of none, rms, feature"):
        one_column(X, y, scale="minmax")
    X[3, 1] = np.nan
    with pytest.raises(ProbeError, match="1 of 20 rows hold NaN"):
        one_column(X, y)
