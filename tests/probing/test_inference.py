"""Inference over a grid: its p-values are uniform under chance, and it finds what is there."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.inference import _benjamini_hochberg, false_discovery_rate, max_t, nested_choice, standardised
from hiddenlake.probing.splits import make_folds


def grid_of(auc, n_positive, n_negative):
    """auc : (layer, position, fold, label_set)."""
    layers, positions = auc.shape[:2]
    return xr.Dataset(
        {
            "fold_auc": (("layer", "position", "C", "fold", "label_set"), auc[:, :, None]),
            "n_positive": (("layer", "position"), np.broadcast_to(n_positive, (layers, positions))),
            "n_negative": (("layer", "position"), np.broadcast_to(n_negative, (layers, positions))),
        },
        coords={
            "layer": np.arange(layers),
            "position": [str(p) for p in range(positions)],
            "C": [0.1],
            "label_set": ["label", *(f"shuffled_{r}" for r in range(auc.shape[3] - 1))],
        },
    )


def chance(rng, shape, n1, n0):
    """AUCs of scores that know nothing."""
    scores = rng.standard_normal((*shape, n1 + n0))
    ranks = scores.argsort(-1).argsort(-1) + 1
    return (ranks[..., :n1].sum(-1) - n1 * (n1 + 1) / 2) / (n1 * n0)


def test_the_standard_error_is_that_of_chance():
    rng = np.random.default_rng(0)
    found = standardised(grid_of(chance(rng, (10, 10, 5, 40), 20, 35), 100, 175))
    assert float(found.std()) == pytest.approx(1.0, abs=0.03) and abs(float(found.mean())) < 0.05


def test_the_p_value_of_the_best_cell_is_uniform_under_chance():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        auc = np.stack([chance(rng, (3, 2, 19 + 1), 12, 20), chance(rng, (3, 2, 19 + 1), 12, 20)], axis=2)
        auc[1] = 0.5 * (auc[0] + auc[1])  # cells of one capture have much in common
        found.append(max_t(grid_of(auc, 24, 40)))
    assert min(found) == pytest.approx(1 / 20)
    counts = np.bincount(np.round(np.array(found) * 20).astype(int), minlength=21)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


def test_a_cell_that_knows_the_label_is_found():
    rng = np.random.default_rng(2)
    auc = chance(rng, (4, 5, 5, 40), 30, 30)
    auc[2, 3, :, 0] += 0.25
    grid = grid_of(auc, 150, 150)
    assert max_t(grid) == 1 / 40
    q = false_discovery_rate(grid).isel(C=0)
    assert float(q[2, 3]) == float(q.min()) < 0.05 and int((q < 0.05).sum()) <= 2


def test_few_discoveries_are_false():
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(60):
        auc = chance(rng, (5, 20, 5, 8), 30, 30)
        auc[0, :, :, 0] += 0.1
        found = (false_discovery_rate(grid_of(auc, 150, 150)) < 0.1).isel(C=0).values
        shares.append(found[1:].sum() / max(1, found.sum()))
    assert np.mean(shares) < 0.12


def test_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.5])
    assert _benjamini_hochberg(p) == pytest.approx([0.04, 0.16 / 3, np.nan, 0.16 / 3, 0.5], nan_ok=True)
    scores = np.random.default_rng(0).random(50) ** 2
    assert _benjamini_hochberg(scores) == pytest.approx(stats.false_discovery_control(scores))


def test_without_shuffles_nothing_is_said():
    rng = np.random.default_rng(4)
    A = xr.DataArray(rng.standard_normal((60, 4)), dims=("sample", "hidden"))
    grid = fit_probes(A, rng.random(60) < 0.5, cv=3, shuffles=0)
    assert np.isnan(max_t(grid)) and false_discovery_rate(grid).isnull().all()


def test_cells_without_probes_are_left_out():
    rng = np.random.default_rng(5)
    auc = chance(rng, (2, 3, 4, 10), 20, 20)
    auc[0, 1] = np.nan
    auc[1, 2, :, 4] = np.nan  # a shuffle that left a fold one class only
    grid = grid_of(auc, 80, 80)
    assert 0 < max_t(grid) <= 1
    q = false_discovery_rate(grid).isel(C=0)
    assert bool(q.isnull()[0, 1]) and int(q.isnull().sum()) == 1


def test_a_nested_choice_is_that_of_scikit_learn_fold_by_fold():
    rng = np.random.default_rng(6)
    y = rng.random(160) < 0.4
    X = rng.standard_normal((2, 2, 160, 5))
    X[1, 0, :, 0] += 0.5 * y
    X[0, 1, :, 0] += 0.5 * y
    A = xr.DataArray(X, dims=("layer", "position", "sample", "hidden"), coords={"position": ["a", "b"]})
    C = (0.003, 1.0)
    grid = fit_probes(A, y, C=C, cv=4, nested=True, tol=1e-12, shuffles=2)
    fold = make_folds(y, n_folds=4, groups=np.arange(160))

    def auc(x, c, train, out):
        scaler = StandardScaler().fit(x[train])
        model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12).fit(scaler.transform(x[train]), y[train])
        return roc_auc_score(y[out], model.decision_function(scaler.transform(x[out])))

    reported, chosen = [], []
    for outer in range(4):
        inner = {
            (layer, position, c): np.mean(
                [auc(X[layer, position], c, (fold != outer) & (fold != f), fold == f) for f in range(4) if f != outer]
            )
            for layer in range(2)
            for position in range(2)
            for c in C
        }
        for (layer, position, c), expected in inner.items():
            found = grid.inner_auc.isel(layer=layer, position=position).sel(C=c, fold=outer)
            assert float(found) == pytest.approx(expected, abs=1e-9)
        chosen.append(max(inner, key=inner.get))
        layer, position, c = chosen[-1]
        reported.append(auc(X[layer, position], c, fold != outer, fold == outer))
    found = nested_choice(grid)
    assert list(zip(found.layers, found.positions, found.C, strict=True)) == [(i, "ab"[p], c) for i, p, c in chosen]
    assert found.auc == pytest.approx(np.mean(reported)) and found.auc_lo < found.auc < found.auc_hi
    assert nested_choice(fit_probes(A, y, cv=4)) is None


def test_a_nested_choice_does_not_see_the_fold_that_it_is_scored_on():
    rng = np.random.default_rng(7)
    y = rng.random(120) < 0.5
    A = xr.DataArray(rng.standard_normal((6, 120, 4)), dims=("layer", "sample", "hidden"))
    one = fit_probes(A, y, cv=3, nested=True, tol=1e-12)
    fold = make_folds(y, n_folds=3, groups=np.arange(120))
    B = A.copy()
    B[:, fold == 1] = rng.standard_normal((6, int((fold == 1).sum()), 4)) + 5 * y[fold == 1, None]
    two = fit_probes(B, y, cv=3, nested=True, tol=1e-12)
    # centring takes the mean of all rows, which moves roundings only
    np.testing.assert_allclose(one.inner_auc.sel(fold=1), two.inner_auc.sel(fold=1), atol=1e-3)
    assert not np.allclose(one.inner_auc.sel(fold=0), two.inner_auc.sel(fold=0), atol=0.05)


def test_a_nested_choice_needs_three_folds():
    A = xr.DataArray(np.random.default_rng(0).standard_normal((60, 4)), dims=("sample", "hidden"))
    with pytest.raises(ProbeError, match="cv is 2: a nested choice needs 3 folds"):
        fit_probes(A, np.arange(60) % 2 == 0, cv=2, nested=True)
