"""Weights of samples and classes, against scikit-learn with the same weights."""

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.splits import make_folds

N, C, CV = 160, 0.3, 3


def cell():
    rng = np.random.default_rng(0)
    y = rng.random(N) < 0.25
    X = rng.standard_normal((N, 6)) * [1, 30, 1, 1, 0.1, 1] + 5.0
    X[:, 2] += y
    return xr.DataArray(X.astype(np.float32), dims=("sample", "hidden")), y, rng.random(N) * (rng.random(N) < 0.9)


def objective(X, y, w, b, weight):
    return C * (weight * np.logaddexp(0.0, -np.where(y, 1.0, -1.0) * (X @ w + b))).sum() + 0.5 * w @ w


@pytest.mark.parametrize("class_weight", [None, "balanced", {True: 4.0}], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["sample weights", "none"])
@pytest.mark.parametrize("solver", ["newton", "sklearn"])
def test_objectives_are_scikit_learns_with_the_same_weights(solver, weighted, class_weight):
    A, y, weight = cell()
    weight = weight if weighted else np.ones(N)
    result = fit_probes(
        A, y, C=C, cv=CV, solver=solver, tol=1e-11, sample_weight=weight if weighted else None, class_weight=class_weight,
        shuffles=0,
    ).squeeze()  # fmt: skip
    assert result.converged
    fold = make_folds(y, n_folds=CV, groups=np.arange(N))
    for f in range(CV):
        inside = (fold != f) & (weight > 0)
        X = StandardScaler().fit_transform(A.values[inside].astype(np.float64))
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500, class_weight=class_weight)
        model.fit(X, y[inside], sample_weight=weight[inside])
        of_class = {False: 1.0, True: 1.0}
        if class_weight == "balanced":
            total = weight[inside].sum()
            of_class = {side: total / (2 * weight[inside & (y == side)].sum()) for side in (False, True)}
        elif class_weight:
            of_class |= class_weight
        both = weight[inside] * np.where(y[inside], of_class[True], of_class[False])
        theirs = objective(X, y[inside], model.coef_[0], model.intercept_[0], both)
        assert float(result.fold_objective[f]) == pytest.approx(theirs, rel=1e-8)


def test_a_weight_is_so_many_copies_in_the_same_fold():
    A, y, _ = cell()
    copies = np.random.default_rng(1).integers(1, 4, N)
    # without scaling, which counts rows
    weighted = fit_probes(A, y, C=C, cv=CV, scale="none", shuffles=0, tol=1e-12, sample_weight=copies)
    rows = np.repeat(np.arange(N), copies)
    fold = make_folds(y, n_folds=CV, groups=np.arange(N))
    for f in range(CV):
        inside = rows[fold[rows] != f]
        X = A.values.astype(np.float64) - A.values[fold != f].mean(axis=0)
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500).fit(X[inside], y[inside])
        theirs = objective(X[inside], y[inside], model.coef_[0], model.intercept_[0], 1.0)
        assert float(weighted.fold_objective.squeeze()[f]) == pytest.approx(theirs, rel=1e-8)


def test_shuffled_labels_are_balanced_too():
    A, y, _ = cell()
    result = fit_probes(A, y, C=C, cv=CV, class_weight="balanced", shuffles=2)
    assert result.converged and result.fold_objective.notnull().all()
    assert float(result.base_rate.squeeze()) == pytest.approx(y.mean())  # held-out samples count alike
    assert result.attrs["class_weight"] == "balanced" and result.attrs["sample_weight"] == "none"


def test_a_cell_whose_class_weighs_nothing_has_a_reason():
    A, y, _ = cell()
    weight, mask = np.where(y, 0.0, 1.0), np.ones((1, N), bool)
    weight[np.flatnonzero(y)[0]], mask[0, np.flatnonzero(y)[0]] = 1.0, False
    result = fit_probes(A, y, cv=CV, sample_weight=weight, mask=mask)
    assert "weight is above 0 outside fold" in result.reason.item() and not result.converged.item()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sample_weight": np.ones(3)}, r"sample_weight has the shape \(3,\): expected one for each of the 160"),
        ({"sample_weight": np.where(np.arange(N) == 7, -1.0, 1.0)}, "sample_weight is -1.0 for sample 7"),
        ({"sample_weight": np.where(np.arange(N) == 7, np.nan, 1.0)}, "sample_weight is nan for sample 7"),
        ({"sample_weight": "positive"}, "positive samples have the weight 0"),
        ({"sample_weight": "negative"}, "negative samples have the weight 0"),
        ({"class_weight": "equal"}, "class_weight is 'equal': expected None, `balanced`"),
        ({"class_weight": {"wrong": 2.0}}, "class_weight gives 'wrong' 2.0"),
        ({"class_weight": {True: 0.0}}, "class_weight gives True 0.0: expected a weight above 0"),
        ({"class_weight": "balanced", "compat": "llmsknow"}, "the paper's fit, l2 without weights"),
    ],
)
def test_bad_weights_are_refused(arguments, sentence):
    A, y, _ = cell()
    if isinstance(side := arguments.get("sample_weight"), str):
        arguments = {"sample_weight": (y != (side == "positive")).astype(float)}
    with pytest.raises(ProbeError, match=sentence):
        fit_probes(A, y, **arguments)


def test_weights_of_samples_that_do_not_count_are_not_looked_at():
    A, y, weight = cell()
    keep = np.arange(N) < 150
    bad = np.where(keep, weight, np.nan)
    some, whole = (fit_probes(A, y, keep=keep, sample_weight=w, cv=CV) for w in (bad, weight))
    xr.testing.assert_identical(some.drop_attrs(), whole.drop_attrs())
