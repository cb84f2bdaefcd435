"""L1 and elastic net: against scikit-learn's saga, against the optimality conditions, and the gap against the truth."""

import warnings

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.solvers import penalised
from hiddenlake.probing.solvers.certificate import certify
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.penalised import solve_penalised
from hiddenlake.probing.solvers.problem import make_problem


def rows(n, d, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-1, 1, d) + 3 * rng.standard_normal(
        (n, 2)
    ) @ rng.standard_normal((2, d))
    y = X[:, 0] / np.abs(X[:, 0]).mean() + rng.standard_normal(n) > 0
    y[:2] = True, False
    return X, y


def problem(X, y, C, l1_ratio, scale="feature", weight=None, class_weight=None):
    return make_problem(
        X, y[None], np.ones((1, len(y))) if weight is None else weight[None], C=np.atleast_1d(C),
        fold=np.zeros(np.size(C), int), label_set=np.zeros(np.size(C), int), scale=scale, l1_ratio=l1_ratio,
        class_weight=class_weight,
    )  # fmt: skip


def objective(Z, y, w, b, C, l1_ratio):
    loss = (C * np.logaddexp(0.0, -np.where(y, 1.0, -1.0) * (Z @ w + b))).sum()
    return loss + l1_ratio * np.abs(w).sum() + 0.5 * (1 - l1_ratio) * w @ w


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.02])
@pytest.mark.parametrize(("n", "d"), [(200, 12), (50, 80)], ids=["tall", "wide"])
def test_reaches_the_objective_of_saga(n, d, l1_ratio):
    X, y = rows(n, d)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    C = [0.1, 1.0]
    found = solve_penalised(problem(X, y, C, l1_ratio), tol=1e-9)
    assert found.converged.all()
    for k in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `penalty` is on its way out
            theirs = LogisticRegression(
                penalty="elasticnet", l1_ratio=l1_ratio, C=C[k], solver="saga", tol=1e-10, max_iter=100_000
            ).fit(Z, y)
        best = objective(Z, y, theirs.coef_[0], theirs.intercept_[0], C[k], l1_ratio)
        ours = objective(Z, y, found.coef[:, k], found.intercept[k], C[k], l1_ratio)
        assert ours == pytest.approx(found.objective[k], rel=1e-12)
        assert ours == pytest.approx(best, rel=1e-8)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000), n=st.integers(12, 60), d=st.integers(1, 40), log_C=st.floats(-3, 1),
    l1_ratio=st.sampled_from([1.0, 0.9, 0.3]), scale=st.sampled_from(["none", "feature"]),
)  # fmt: skip
def test_optimality_conditions_hold(seed, n, d, log_C, l1_ratio, scale):
    X, y = rows(n, d, seed)
    rng = np.random.default_rng(seed)
    weight, classes = rng.random(n) + 0.1, np.array([[0.5, 2.0]])
    at = problem(X, y, 10.0**log_C, l1_ratio, scale, weight, classes)
    found = solve_penalised(at, tol=1e-9)
    assert found.converged.all() and found.gap_bound[0] >= 0
    w, Z = found.coef[:, 0], at.coordinates(0, np.arange(n))
    sign = np.where(y, 1.0, -1.0)
    alpha = 10.0**log_C * weight * classes[0][y.astype(int)] * expit(-sign * (Z @ w + found.intercept[0]))
    v = Z.T @ (alpha * sign)
    slack = 1e-3 * max(1.0, np.abs(v).max())
    assert abs((alpha * sign).sum()) <= 1e-9 * alpha.sum()
    assert (np.abs(v) <= l1_ratio + (1 - l1_ratio) * np.abs(w) + slack).all()
    inside = np.abs(w) > 1e-3 * np.abs(w).max(initial=0.0)
    np.testing.assert_allclose(v[inside], (l1_ratio * np.sign(w) + (1 - l1_ratio) * w)[inside], atol=slack)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.02])
@pytest.mark.parametrize(("n", "d"), [(120, 10), (30, 60)], ids=["tall", "wide"])
def test_the_gap_bounds_the_truth_of_any_weights(n, d, l1_ratio):
    X, y = rows(n, d)
    at = problem(X, y, 0.7, l1_ratio)
    best = solve_penalised(at, tol=1e-9)
    rng = np.random.default_rng(2)
    for spread in (0.0, 1e-3, 0.1, 3.0):
        found = certify(at, best.coef + spread * rng.standard_normal(best.coef.shape), rng.standard_normal(1))
        gap = float(found.objective[0]) - best.objective[0]
        assert -1e-9 * best.objective[0] <= gap <= float(found.gap_bound[0]) + 1e-9 * best.objective[0]


def test_a_vanishing_l1_part_has_the_l2_certificate():
    X, y = rows(60, 5)
    coef = solve_newton(problem(X, y, 0.7, 0.0), 1e-9).coef + 0.01
    ridge, net = (certify(problem(X, y, 0.7, l1_ratio), coef, np.zeros(1)) for l1_ratio in (0.0, 1e-12))
    assert float(net.objective) == pytest.approx(float(ridge.objective), rel=1e-8)
    assert float(net.gap_bound) == pytest.approx(float(ridge.gap_bound), rel=1e-9)


def test_weak_strengths_leave_no_weight_and_say_so_exactly():
    X, y = rows(100, 30)
    found = solve_penalised(problem(X, y, 1e-4, 1.0), tol=1e-12)
    assert (found.coef == 0).all() and found.converged.all() and found.n_iter[0] == 0
    assert found.intercept[0] == pytest.approx(np.log(y.mean() / (1 - y.mean())))


def test_a_path_is_its_columns_alone():
    X, y = rows(150, 20)
    labels = np.stack([y, np.random.default_rng(1).permutation(y)])
    C, sets = np.array([1.0, 0.03, 0.2, 0.03]), np.array([0, 0, 1, 1])
    train = np.arange(150)[None] % 3 != np.arange(2)[:, None]
    fold = np.array([0, 1, 0, 1])
    together = solve_penalised(make_problem(X, labels, train, C=C, fold=fold, label_set=sets, l1_ratio=1.0), tol=1e-9)
    for k in range(4):
        inside = train[fold[k]]
        alone = solve_penalised(problem(X[inside], labels[sets[k]][inside], C[k], 1.0), tol=1e-9)
        assert together.objective[k] == pytest.approx(alone.objective[0], rel=1e-8)
        assert ((together.coef[:, k] != 0) == (alone.coef[:, 0] != 0)).all()


def test_a_solver_that_is_stopped_says_so(monkeypatch):
    monkeypatch.setattr(penalised, "_MAX_STEPS", 1)
    X, y = rows(100, 30)
    found = solve_penalised(problem(X, y, 1.0, 1.0), tol=1e-9)
    assert not found.converged[0] and found.gap_bound[0] > 1e-9 * found.objective[0]


def cells():
    X, y = rows(120, 6)
    return xr.DataArray(X.astype(np.float32), dims=("sample", "hidden")), y


def test_probes_with_an_l1_part_are_certified():
    A, y = cells()
    ridge = fit_probes(A, y, C=(0.05, 1.0), shuffles=1)
    for penalty, l1_ratio in (("l1", None), ("elasticnet", 0.5)):
        found = fit_probes(A, y, C=(0.05, 1.0), penalty=penalty, l1_ratio=l1_ratio, shuffles=1, class_weight="balanced")
        assert found.converged.all() and float(found.relative_gap.max()) <= 1e-6
        assert found.attrs["solver"] == "sklearn" and found.attrs["l1_ratio"] == (l1_ratio or 1.0)
        assert not np.allclose(found.objective, ridge.objective)
        # Weights are within reach of the optimum's where the objective is strongly convex, and nowhere else.
        width = float((found.auc_certified_hi - found.auc_certified_lo).max())
        assert width == 1.0 if penalty == "l1" else 0 <= width < 0.2
        assert (found.auc_certified_lo <= found.auc).all() and (found.auc <= found.auc_certified_hi).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"penalty": "none"}, "unknown penalty 'none': expected `l2`, `l1` or `elasticnet`"),
        ({"penalty": "elasticnet"}, "l1_ratio is None: an elastic net needs a number between 0 and 1"),
        ({"penalty": "elasticnet", "l1_ratio": 1.0}, "l1_ratio is 1.0"),
        ({"penalty": "l1", "l1_ratio": 0.5}, r"penalty 'l1' has no l1_ratio \(0.5\)"),
        ({"l1_ratio": 0.5}, r"penalty 'l2' has no l1_ratio \(0.5\)"),
        ({"penalty": "l1", "solver": "newton"}, "solver 'newton' has no l1 penalty: expected one of auto, sklearn"),
        ({"penalty": "l1", "compat": "llmsknow"}, "l2 without weights"),
    ],
)
def test_penalties_that_there_are_not_are_refused(arguments, sentence):
    A, y = cells()
    with pytest.raises(ProbeError, match=sentence):
        fit_probes(A, y, **arguments)


def test_the_optimum_of_another_penalty_is_not_believed():
    X, y = rows(100, 30)
    found = solve_newton(problem(X, y, 1.0, 0.5), 1e-6)
    assert not found.converged[0] and found.gap_bound[0] > 1e-3 * found.objective[0]
