"""Inference over a grid: its p-values are uniform under chance, and it finds what is there."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.inference import _benjamini_hochberg, false_discovery_rate, max_t, standardised


def grid_of(auc, n_positive, n_negative):
    """auc : (layer, position, fold, label_set)."""
    layers, positions = auc.shape[:2]
    return xr.Dataset(
        {
            "fold_auc": (("layer", "position", "C", "fold", "label_set"), auc[:, :, None]),
            "n_positive": (("layer", "position"), np.broadcast_to(n_positive, (layers, positions))),
            "n_negative": (("layer", "position"), np.broadcast_to(n_negative, (layers, positions))),
        },
        coords={"layer": np.arange(layers), "position": [str(p) for p in range(positions)], "C": [0.1]},
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
