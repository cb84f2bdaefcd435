"""fit_probes against scikit-learn pipelines, and what must not change it."""

import threading

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from xarray.backends import BackendArray
from xarray.core import indexing

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.splits import make_folds


def activations(n=150, n_layers=2, n_positions=2, d=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    X = rng.standard_normal((n_layers, n_positions, n, d)) * np.array([1, 30, 1, 1, 0.1, 1]) + 5.0
    X[0, 1, :, 2] += 1.2 * y
    return (
        xr.DataArray(
            X.astype(np.float32),
            dims=("layer", "position", "sample", "hidden"),
            coords={"layer": [3, 7], "position": ["last_q", "-1"]},
        ),
        y,
    )


@pytest.mark.parametrize("solver", ["newton", "sklearn"])
def test_each_fold_is_scikit_learns_pipeline(solver):
    A, y = activations()
    result = fit_probes(A, y, C=(0.01, 1.0), cv=3, solver=solver, tol=1e-13, shuffles=2)
    fold = make_folds(y, n_folds=3, groups=np.arange(150))
    assert result.converged.all()
    for layer in (3, 7):
        X = A.sel(layer=layer, position="-1").values.astype(np.float64)
        for C in (0.01, 1.0):
            aucs = []
            for f in range(3):
                scaler = StandardScaler().fit(X[fold != f])
                model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500)
                model.fit(scaler.transform(X[fold != f]), y[fold != f])
                aucs.append(roc_auc_score(y[fold == f], model.decision_function(scaler.transform(X[fold == f]))))
            cell = result.sel(layer=layer, position="-1", C=C)
            np.testing.assert_allclose(cell.fold_auc.sel(label_set="label"), aucs, atol=1e-12)
            assert float(cell.auc) == pytest.approx(np.mean(aucs))
    assert result.attrs["solver"] == solver


def test_the_order_of_the_samples_changes_nothing():
    A, y = activations()
    index = np.arange(150)
    order = np.random.default_rng(1).permutation(150)
    one = fit_probes(A, y, index=index, groups=index // 2, C=(0.01, 1.0))
    two = fit_probes(A.isel(sample=order), y[order], index=index[order], groups=index[order] // 2, C=(0.01, 1.0))
    for name in one.data_vars:
        xr.testing.assert_equal(one[name], two[name])


def test_equal_rows_tie_exactly():
    rng = np.random.default_rng(0)
    y = rng.random(203) < 0.5
    X = rng.standard_normal((3, 64)).astype(np.float32)[rng.integers(0, 3, 203)]
    A = xr.DataArray(X, dims=("sample", "hidden"))
    result = fit_probes(A, y, cv=4)
    fold = make_folds(y, n_folds=4, groups=np.arange(203))
    token = np.unique(X, axis=0, return_inverse=True)[1].ravel()
    for f in range(4):
        model = LogisticRegression(C=0.01, solver="newton-cholesky", tol=1e-10)
        scaler = StandardScaler().fit(X[fold != f].astype(float))
        model.fit(scaler.transform(X[fold != f].astype(float)), y[fold != f])
        of_token = {t: model.decision_function(scaler.transform(X[token == t][:1].astype(float)))[0] for t in range(3)}
        exact = roc_auc_score(y[fold == f], [of_token[t] for t in token[fold == f]])
        assert float(result.fold_auc.sel(label_set="label").squeeze()[f]) == pytest.approx(exact, abs=1e-12)


def test_a_token_that_is_always_the_same_gives_one_half():
    A = xr.DataArray(np.full((60, 5), 0.1, np.float32), dims=("sample", "hidden"))
    result = fit_probes(A, np.arange(60) % 3 == 0)
    assert float(result.auc.squeeze()) == 0.5 and bool(result.converged.squeeze())


def test_absent_cells_are_nan_with_a_reason():
    A, y = activations()
    A = A.copy()
    A[:, 0] = np.nan
    A[1, 1, y] = np.nan
    result = fit_probes(A, y)
    assert result.reason.sel(layer=3, position="last_q").item() == "no sample has this token"
    assert result.reason.sel(layer=7, position="-1").item().startswith("one class only: 0 positive, ")
    assert result.reason.sel(layer=3, position="-1").item() == ""
    fitted = result.auc.squeeze("C").notnull().values
    assert fitted.tolist() == [[False, True], [False, False]]
    assert (result.converged.squeeze("C").values == fitted).all()
    assert result.n.values.tolist() == [[0, 150], [0, int((~y).sum())]]


def test_a_cell_with_too_few_of_a_class_in_a_fold_is_absent():
    A, y = activations()
    mask = np.ones((2, 150), bool)
    mask[0, np.flatnonzero(y)[7:]] = False
    result = fit_probes(A, y, mask=mask)
    assert "7 positive" in result.reason.sel(layer=3, position="last_q").item()
    assert "at least 2 are needed" in result.reason.sel(layer=3, position="last_q").item()
    assert result.reason.sel(layer=3, position="-1").item() == ""


def test_keep_leaves_samples_out_everywhere():
    A, y = activations()
    keep = np.arange(150) < 120
    some = fit_probes(A, y, keep=keep)
    alone = fit_probes(A.isel(sample=slice(120)), y[:120])
    xr.testing.assert_allclose(some.auc, alone.auc)
    assert some.attrs["n"] == 120 and (some.n == 120).all()


def test_groups_stay_together_and_bring_the_bootstrap():
    A, y = activations()
    # The same sample four times: without groups it would be recognised across folds.
    noise = A.isel(layer=[1], position=[1])
    index = np.repeat(np.arange(150), 4)
    A4, y4 = noise.isel(sample=index), y[index]
    grouped = fit_probes(A4, y4, groups=index, C=100.0)
    loose = fit_probes(A4, y4, C=100.0)
    assert grouped.attrs["interval"] == "95 %, bootstrap of whole groups" and grouped.attrs["n_groups"] == 150
    assert loose.attrs["interval"].startswith("95 %, DeLong")
    width = lambda r: float((r.auc_hi - r.auc_lo).squeeze())
    assert width(grouped) > 1.5 * width(loose)
    assert float(grouped.auc_lo.squeeze()) < 0.5 < float(grouped.auc_hi.squeeze())


def test_dimensions_may_be_missing_or_in_another_order():
    A, y = activations()
    full = fit_probes(A, y)
    turned = fit_probes(A.transpose("sample", "position", "hidden", "layer").transpose(..., "hidden"), y)
    xr.testing.assert_allclose(full.auc, turned.auc)
    flat = fit_probes(A.sel(layer=3), y)
    assert flat.layer.values.tolist() == [3]
    xr.testing.assert_allclose(full.auc.sel(layer=[3]), flat.auc)


def test_shuffles_may_be_none_and_their_cells_stay_near_one_half():
    A, y = activations(n=400)
    assert "shuffled_auc" not in fit_probes(A, y, shuffles=0)
    many = fit_probes(A, y, shuffles=10)
    assert many.sizes["label_set"] == 11
    assert abs(float(many.shuffled_auc.mean()) - 0.5) < 0.03
    assert float(many.auc.sel(layer=3, position="-1").squeeze()) > 0.7


class Counting(BackendArray):
    """A lazy array that notes what is read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.reads = values, values.shape, values.dtype, []

    def __getitem__(self, key):
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key):
        self.reads.append(self.values[key].size)
        return self.values[key]


@pytest.mark.parametrize("compat", [None, "llmsknow"])
@pytest.mark.parametrize("layered", [True, False], ids=["layers", "no layers"])
def test_cells_are_read_one_at_a_time_and_reported(compat, layered):
    A, y = activations()
    values = A if layered else A.isel(layer=0, drop=True)
    backend = Counting(values.values)
    lazy = xr.DataArray(xr.Variable(values.dims, indexing.LazilyIndexedArray(backend)), values.coords)
    seen = []
    mask = np.ones((2, 150), bool)
    fit_probes(lazy, y, mask=mask, compat=compat, progress=lambda done, total: seen.append((done, total)))
    n_cells = 4 if layered else 2
    assert seen == [(i, n_cells) for i in range(1, n_cells + 1)]
    assert backend.reads == [150 * 6] * n_cells


def test_interruption_ends_the_sweep():
    A, y = activations()

    def stop(done, total):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fit_probes(A, y, progress=stop)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"C": 0.0}, ProbeError, r"C is \[0.0\]: expected one or more numbers above 0"),
        ({"tol": 0.0}, ProbeError, "tol is 0.0"),
        ({"solver": "liblinear"}, ProbeError, "unknown solver 'liblinear': expected one of auto, newton, sklearn"),
        ({"scale": "minmax"}, ProbeError, "unknown scale 'minmax'"),
        ({"compat": "probekit"}, UnknownNameError, "unknown compat 'probekit': expected `llmsknow` or None"),
        ({"shuffles": -1}, ProbeError, "shuffles is -1: expected 0 or more"),
        ({"cv": 200}, ProbeError, "150 groups cannot fill 200 folds"),
        ({"index": np.zeros(150)}, ProbeError, "index names 1 of 150 samples"),
        ({"groups": ["a"]}, ProbeError, r"groups has the shape \(1,\)"),
        ({"mask": np.ones((3, 150), bool)}, ProbeError, r"mask has the shape \(3, 150\): expected"),
        ({"y": np.zeros(150, bool)}, ProbeError, r"all 150 samples are of one class"),
        ({"y": np.zeros(3, bool)}, ProbeError, r"y has the shape \(3,\): expected one value for each of the 150"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_in_a_sentence(arguments, error, sentence):
    A, y = activations()
    with pytest.raises(error, match=sentence):
        fit_probes(A, **({"y": y} | arguments))


def test_nan_where_the_mask_says_there_is_a_token_is_an_error():
    A, y = activations()
    A = A.copy()
    A[1, 0, 5] = np.nan
    with pytest.raises(ProbeError, match="layer 7, position last_q: activations are NaN"):
        fit_probes(A, y, mask=np.ones((2, 150), bool))


def test_activations_need_a_sample_axis():
    A, y = activations()
    with pytest.raises(ProbeError, match="expected one named `sample`"):
        fit_probes(A.rename(sample="row"), y)
    with pytest.raises(ProbeError, match="expected layer, position, sample, hidden"):
        fit_probes(A.expand_dims("batch"), y)


def test_metrics_are_those_of_the_held_out_probabilities():
    A, y = activations(n=203)
    cell = fit_probes(A, y, C=(0.01, 1.0), cv=3).sel(layer=3, position="-1")
    fold = make_folds(y, n_folds=3, groups=np.arange(203))
    X = A.sel(layer=3, position="-1").values.astype(np.float64)
    for C in (0.01, 1.0):
        probability = np.empty(203)
        for f in range(3):
            scaler = StandardScaler().fit(X[fold != f])
            model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12).fit(
                scaler.transform(X[fold != f]), y[fold != f]
            )
            probability[fold == f] = model.predict_proba(scaler.transform(X[fold == f]))[:, 1]
        at = cell.sel(C=C)
        assert float(at.brier) == pytest.approx(np.mean((probability - y) ** 2), rel=1e-4)
        assert float(at.accuracy) == np.mean((probability >= 0.5) == y)
        assert float(at.auprc) == pytest.approx(average_precision_score(y, probability), rel=1e-3)
        assert float(at.base_rate) == y.mean() and float(at.majority_accuracy) == 1 - y.mean()


def test_the_certified_interval_holds_the_auc_of_the_optimum():
    A, y = activations()
    best = fit_probes(A, y, C=(0.01, 10.0), tol=1e-13)
    for tol in (1e-1, 1e-3, 1e-6):
        found = fit_probes(A, y, C=(0.01, 10.0), tol=tol)
        assert (found.auc_certified_lo <= best.auc + 1e-12).all() and (best.auc <= found.auc_certified_hi + 1e-12).all()
        assert (found.auc_certified_lo <= found.auc + 1e-12).all() and (
            found.auc <= found.auc_certified_hi + 1e-12
        ).all()
    assert float((best.auc_certified_hi - best.auc_certified_lo).max()) < 1e-3
