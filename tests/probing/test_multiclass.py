"""fit_multiclass against scikit-learn's multinomial and one-vs-rest pipelines, and what must not change it."""

import numpy as np
import pytest
import xarray as xr
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.class_metrics import class_aucs
from hiddenlake.probing.metrics import auroc
from hiddenlake.probing.multiclass import fit_multiclass
from hiddenlake.probing.splits import make_folds

N, CV = 180, 3
NAMES = np.array(["berlin", "paris", "rome", "wien"])


def activations(seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice(4, N, p=[0.4, 0.3, 0.2, 0.1])
    X = rng.standard_normal((2, 2, N, 6)) * np.array([1, 30, 1, 1, 0.1, 1]) + 5.0
    X[0, 1, :, 2] += y
    return (
        xr.DataArray(
            X.astype(np.float32), dims=("layer", "position", "sample", "hidden"),
            coords={"layer": [3, 7], "position": ["last_q", "-1"]},
        ),
        y,
    )  # fmt: skip


def objective(Z, y, W, b, s):
    z = Z @ W + b
    return (s * (np.logaddexp.reduce(z, axis=1) - z[np.arange(len(y)), y])).sum() + 0.5 * (W * W).sum()


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("multiclass", ["softmax", "ovr"])
def test_each_fold_is_scikit_learns_pipeline(multiclass, class_weight):
    A, y = activations()
    weight = np.random.default_rng(1).random(N) + 0.1
    result = fit_multiclass(
        A, NAMES[y], multiclass=multiclass, C=(0.05, 1.0), cv=CV, tol=1e-11, sample_weight=weight,
        class_weight=class_weight,
    )  # fmt: skip
    assert result.converged.all() and result["class"].values.tolist() == NAMES.tolist()
    fold = make_folds(y, n_folds=CV, groups=np.arange(N))
    X = A.sel(layer=3, position="-1").values.astype(np.float64)
    for C in (0.05, 1.0):
        cell = result.sel(layer=3, position="-1", C=C)
        share, aucs = np.empty((N, 4)), np.empty((CV, 4))
        for f in range(CV):
            inside, out = fold != f, fold == f
            scaler = StandardScaler().fit(X[inside])
            Z, held = scaler.transform(X[inside]), scaler.transform(X[out])
            if multiclass == "softmax":
                model = LogisticRegression(C=C, solver="newton-cg", tol=1e-11, max_iter=2000, class_weight=class_weight)
                model.fit(Z, y[inside], sample_weight=weight[inside])
                share[out] = model.predict_proba(held)
                score = share[out]
                counts = np.bincount(y[inside], weight[inside])
                of_class = counts.sum() / (4 * counts) if class_weight else np.ones(4)
                best = objective(Z, y[inside], model.coef_.T, model.intercept_, C * (weight * of_class[y])[inside])
                assert float(cell.fold_objective.isel(fold=f).sel(label_set="label")) == pytest.approx(best, rel=1e-8)
            else:
                score = np.empty((out.sum(), 4))
                for k in range(4):
                    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-11, class_weight=class_weight)
                    score[:, k] = model.fit(Z, y[inside] == k, sample_weight=weight[inside]).decision_function(held)
                share[out] = expit(score) / expit(score).sum(axis=1, keepdims=True)
            aucs[f] = [roc_auc_score(y[out] == k, score[:, k]) for k in range(4)]
        np.testing.assert_allclose(cell.class_auc, aucs.mean(axis=0), atol=1e-12)
        assert float(cell.auc) == pytest.approx(aucs.mean())
        assert float(cell.log_loss) == pytest.approx(log_loss(y, share), rel=1e-5)
        np.testing.assert_array_equal(cell.confusion, confusion_matrix(y, share.argmax(axis=1)))
        assert float(cell.accuracy) == np.mean(share.argmax(axis=1) == y)
        assert float(cell.majority_accuracy) == np.bincount(y).max() / N


def test_a_planted_signal_is_found_and_shuffles_find_nothing():
    A, y = activations()
    result = fit_multiclass(A, y, cv=CV, C=0.1, shuffles=4).squeeze("C")
    assert float(result.auc.sel(layer=3, position="-1")) > 0.7
    assert abs(float(result.shuffled_auc.mean()) - 0.5) < 0.05
    assert (result.auc_lo <= result.auc).all() and (result.auc <= result.auc_hi).all()
    assert (result.n_class.sum("class") == result.n).all() and result.confusion.sum(
        ("class", "predicted")
    ).values.tolist() == [[N, N], [N, N]]


def test_the_variance_of_a_class_is_delongs():
    rng = np.random.default_rng(0)
    truth, scores = rng.choice(3, 60), rng.integers(0, 9, (60, 3)).astype(float)
    found = class_aucs(scores, truth)
    expected = auroc(scores, truth[:, None] == np.arange(3))
    np.testing.assert_allclose(found.auc, expected.auc, atol=1e-12)
    np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-9)
    # Two classes whose scores are each other's negative have one AUC, and one variance.
    two = class_aucs(np.stack([scores[:, 0], -scores[:, 0]], axis=1), (truth > 0).astype(int))
    assert two.macro == pytest.approx(two.auc[0]) and two.macro_variance == pytest.approx(two.variance[0])
    np.testing.assert_allclose(class_aucs(scores, truth, np.arange(60)).variance, found.variance)


def test_the_variance_of_the_mean_is_that_of_repeated_draws():
    rng = np.random.default_rng(0)

    def draw(copies):
        truth = np.repeat(np.arange(3), 20)
        scores = rng.standard_normal((60, 3)) + 0.8 * (truth[:, None] == np.arange(3))
        again = np.repeat(np.arange(60), copies)
        return class_aucs(scores[again], truth[again], again if copies > 1 else None)

    for copies in (1, 3):
        found = [draw(copies) for _ in range(300)]
        seen = np.var([one.macro for one in found])
        assert np.mean([one.macro_variance for one in found]) == pytest.approx(seen, rel=0.2)


def test_the_order_of_the_samples_changes_nothing():
    A, y = activations()
    index, order = np.arange(N), np.random.default_rng(1).permutation(N)
    one = fit_multiclass(A, y, index=index, groups=index // 2, cv=CV)
    two = fit_multiclass(A.isel(sample=order), y[order], index=index[order], groups=index[order] // 2, cv=CV)
    xr.testing.assert_identical(one, two)
    assert one.attrs["n_groups"] == N // 2 and "Obuchowski" in one.attrs["interval"]


@pytest.mark.parametrize("multiclass", ["softmax", "ovr"])
def test_equal_rows_tie_exactly(multiclass):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1, 64)).astype(np.float32)[np.zeros(N, int)]
    X[:40] = rng.standard_normal(64)
    A, y = xr.DataArray(X, dims=("sample", "hidden")), np.arange(N) % 3
    result = fit_multiclass(A, y, multiclass=multiclass, cv=CV, scale="none").squeeze()
    token = np.arange(N) < 40
    fold = make_folds(y, n_folds=CV, groups=np.arange(N))
    for f in range(CV):
        # Two tokens give each class one of the two orders, or none.
        auc = [roc_auc_score(y[fold == f] == k, token[fold == f]) for k in range(3)]
        found = float(result.fold_auc.sel(label_set="label")[f])
        assert any(
            found
            == pytest.approx(
                np.mean([a if s > 0 else 1 - a if s < 0 else 0.5 for a, s in zip(auc, signs, strict=True)])
            )
            for signs in np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T
        )


def test_absent_cells_are_nan_with_a_reason():
    A, y = activations()
    A = A.copy()
    A[0, 0] = np.nan
    A[1, 1, np.flatnonzero(y == 3)[3:]] = np.nan
    result = fit_multiclass(A, NAMES[y], cv=CV).squeeze("C")
    assert result.reason.sel(layer=3, position="last_q").item() == "no sample has this token"
    assert "of class 'wien', at least 2 are needed (3 in all)" in result.reason.sel(layer=7, position="-1").item()
    fitted = result.auc.notnull().values
    assert fitted.tolist() == [[False, True], [True, False]] and (result.converged.values == fitted).all()
    assert result.n_class.sel(layer=7, position="-1").values.tolist() == [*np.bincount(y)[:3], 3]


def test_keep_leaves_samples_and_classes_out():
    A, y = activations()
    labels = NAMES[y].astype(object)
    labels[y == 3] = None
    some = fit_multiclass(A, labels, keep=y != 3, cv=CV)
    alone = fit_multiclass(A.isel(sample=np.flatnonzero(y != 3)), NAMES[y[y != 3]], index=np.flatnonzero(y != 3), cv=CV)
    xr.testing.assert_allclose(some.auc, alone.auc)
    assert some["class"].values.tolist() == NAMES[:3].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"y": np.arange(N) % 2}, ProbeError, "y has 2 classes: expected three or more"),
        (
            {"y": np.arange(N) // 4},
            ProbeError,
            r"45 of 45 classes have fewer than 2 samples for each of 5 folds, e.g. '0' 4",
        ),
        ({"y": np.array([None, "a", "b"] * 60, object)}, ProbeError, "y is None or NaN for some samples"),
        ({"multiclass": "crammer"}, UnknownNameError, "unknown multiclass 'crammer': expected `softmax` or `ovr`"),
        ({"class_weight": {0: 1.0}}, ProbeError, "expected None or `balanced`"),
        ({"sample_weight": -np.ones(N)}, ProbeError, "sample_weight is -1.0 for sample 0"),
        ({"C": []}, ProbeError, r"C is \[\]"),
        ({"tol": 0.0}, ProbeError, "tol is 0.0"),
        ({"shuffles": -1}, ProbeError, "shuffles is -1"),
        ({"index": np.zeros(N)}, ProbeError, "index names 1 of 180 samples"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_in_a_sentence(arguments, error, sentence):
    A, y = activations()
    with pytest.raises(error, match=sentence):
        fit_multiclass(A, **({"y": y} | arguments))


def test_a_class_without_weight_has_a_reason():
    A, y = activations()
    result = fit_multiclass(A, NAMES[y], cv=CV, sample_weight=(y != 2).astype(float))
    assert (result.reason == "class 'rome' has no weight above 0 outside fold 0 of 3").all()
