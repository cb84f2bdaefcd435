"""Solvers against scikit-learn's newton-cholesky, and the certificate against the true gap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.certificate import certify, losses
from hiddenlake.probing.solvers import newton
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.preconditioner import Preconditioner, ridge_solver
from hiddenlake.probing.solvers.problem import make_problem
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
        gap = at.objective[0] - best.objective[0]
        assert -1e-9 * best.objective[0] <= gap <= at.gap_bound[0] + 1e-9 * best.objective[0]


def test_the_certificate_is_the_fenchel_gap():
    X, y = noisy(60, 5)
    problem = one_column(X, y, 0.7)
    coef = RNG(3).standard_normal((5, 1))
    at = certify(problem, coef, np.zeros(1))
    z = problem.rows @ coef[:, 0] + at.intercept[0]
    sign = np.where(y, 1.0, -1.0)
    p = 1.0 / (1.0 + np.exp(sign * z))
    alpha = 0.7 * p
    assert abs((alpha * sign).sum()) < 1e-10  # dual feasible
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    dual = 0.7 * entropy.sum() - 0.5 * np.sum((problem.rows.T @ (alpha * sign)) ** 2)
    assert at.objective[0] - dual == pytest.approx(at.gap_bound[0], rel=1e-9)


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
    monkeypatch.setattr(newton, "_MAX_CG", 1)
    monkeypatch.setattr(newton, "_MAX_NEWTON_CG", 2)
    for case in (badly_scaled, wide, separable):
        X, y = case()
        solution = solve_newton(one_column(X, y, 10.0), tol=1e-9)
        assert solution.converged.all() and solution.n_iter[0] > 2


def test_a_solver_that_is_stopped_says_so(monkeypatch):
    monkeypatch.setattr(newton, "_MAX_NEWTON_CG", 1)
    monkeypatch.setattr(newton, "_MAX_EXACT", 1)
    X, y = badly_scaled()
    solution = solve_newton(one_column(X, y, 10.0), tol=1e-9)
    assert not solution.converged.any()
    assert solution.gap_bound[0] > 1e-9 * solution.objective[0]


def test_scikit_agrees_under_the_same_certificate():
    X, y = badly_scaled()
    problem = one_column(X, y, 0.1, "feature")
    ours, theirs = solve_newton(problem, 1e-9), solve_scikit(problem, 1e-9)
    assert theirs.converged.all()
    np.testing.assert_allclose(ours.objective, theirs.objective, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept, theirs.intercept, atol=1e-4)


@pytest.mark.parametrize(("m", "d"), [(30, 7), (7, 30)], ids=["primal", "dual"])
def test_inverses_are_inverses(m, d):
    X, y = noisy(m, d)
    r = RNG(1).standard_normal((d, 3))
    np.testing.assert_allclose(ridge_solver(X)(r), np.linalg.solve(np.eye(d) + X.T @ X, r), rtol=1e-9, atol=1e-12)
    y[:2] = [True, False]
    problem = one_column(X, y)
    c = np.array([0.5, 0.5, 60.0])  # the last is too far from the others for their inverse
    expected = [np.linalg.solve(np.eye(d) + k * problem.rows.T @ problem.rows, r[:, i]) for i, k in enumerate(c)]
    np.testing.assert_allclose(Preconditioner(problem).apply(r, c), np.stack(expected, 1), rtol=1e-8, atol=1e-12)


def test_the_intercept_is_found_where_newton_alone_overshoots():
    scores = np.array([[-800.0], [-500.0], [300.0], [900.0]])
    sign = np.array([[-1.0], [1.0], [-1.0], [1.0]])
    at = losses(scores, np.array([5e3]), sign, np.ones((4, 1)))
    assert abs(at.residual.sum()) < 1e-9


def test_scales_are_those_of_the_training_rows():
    X, y = noisy(60, 4)
    X[:, 2] = 3.3
    train = np.arange(60) < 40
    unit = one_column(X, y, scale="feature", train=train).unit[0]
    expected = 1.0 / X[train].std(axis=0)[[0, 1, 3]]
    np.testing.assert_allclose(unit[[0, 1, 3]], expected, rtol=1e-10)
    assert unit[2] == 0.0
    rms = one_column(X, y, scale="rms", train=train).unit[0]
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
