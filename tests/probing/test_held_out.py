"""held_out beside the grid, and beside scikit-learn on the folds that it names."""

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.held_out import held_out

CELL = 1, "exact_answer_last"


@pytest.fixture(scope="module")
def capture(make_capture):
    return make_capture(n=300)


def fold_aucs(found):
    inside = found.where(found.fold >= 0, drop=True)
    of = inside.fold.values
    return [
        roc_auc_score(inside.positive.values[of == f], inside.score.values[of == f]) for f in range(int(of.max()) + 1)
    ]


@pytest.mark.parametrize("groups", ["group", "gold"])
def test_the_aucs_are_the_grids_to_the_bit(capture, groups):
    grid = fit_grid(
        capture, "mlp_out", groups=groups, layers=[0, 1], positions=["-1", CELL[1]], shuffles=0, controls=()
    )
    for position in ("-1", CELL[1]):
        found = held_out(capture, "mlp_out", 1, position, groups=groups)
        cell = grid.sel(layer=1, position=position)
        assert (found.fold_auc.values == cell.fold_auc.sel(label_set="label").squeeze().values).all()
        assert found.attrs["auc"] == cell.auc.item() and found.attrs["converged"]
        assert int((found.fold >= 0).sum()) == int(cell.n)
        np.testing.assert_allclose(fold_aucs(found), found.fold_auc, atol=1e-12)


def test_each_score_is_of_a_probe_that_did_not_see_the_sample(capture):
    found = held_out(capture, "mlp_out", *CELL, C=0.1, cv=4, tol=1e-13)
    X = capture.mlp_out.sel(layer=CELL[0], position=CELL[1]).values.astype(np.float64)
    fold, y = found.fold.values, ~capture.correct.values
    assert (found.positive.values == y).all() and found.attrs["positive_class"] == "wrong"
    for f in range(4):
        train, out = (fold >= 0) & (fold != f), fold == f
        scaler = StandardScaler().fit(X[train])
        model = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-12).fit(scaler.transform(X[train]), y[train])
        np.testing.assert_allclose(
            found.score.values[out], model.decision_function(scaler.transform(X[out])), atol=1e-5
        )
        np.testing.assert_allclose(
            found.probability.values[out], model.predict_proba(scaler.transform(X[out]))[:, 1], atol=1e-6
        )


def test_samples_outside_the_cell_have_no_score(capture):
    absent = capture.token_index.sel(position=CELL[1]).values < 0
    assert absent.any()
    hedged = np.array([None, 1.0, 0.0], object)[np.arange(300) % 3]
    found = held_out(capture.assign(hedged=("sample", hedged)), "mlp_out", *CELL, label="hedged")
    outside = absent | (hedged == None)  # noqa: E711
    assert (found.score.isnull().values == outside).all() and (found.probability.isnull().values == outside).all()
    assert ((found.fold.values == -1) == outside).all()
    assert (found.labelled.values == (hedged != None)).all()  # noqa: E711
    assert (found.sample.values == capture.sample.values).all()


def test_the_order_of_the_capture_changes_nothing(capture):
    order = np.random.default_rng(3).permutation(300)
    one = held_out(capture, "mlp_out", *CELL)
    two = held_out(capture.isel(sample=order), "mlp_out", *CELL)
    xr.testing.assert_identical(one.isel(sample=order), two)


def test_bad_input_is_refused_in_a_sentence(capture):
    with pytest.raises(ProbeError, match=r"C is \[0.1, 1.0\]: .* name one number"):
        held_out(capture, "mlp_out", *CELL, C=[0.1, 1.0])
    few = capture.assign(token_index=capture.token_index.copy())
    few.token_index.loc["-1", capture.sample[capture.correct]] = -1
    with pytest.raises(ProbeError, match="layer 0, -1: one class only"):
        held_out(few, "mlp_out", 0, "-1")
    with pytest.raises(UnknownNameError, match="no layer"):
        held_out(capture, "mlp_out", 9, "-1")


@pytest.mark.parametrize("scale", ["feature", "none"])
def test_the_probes_give_the_scores_of_the_samples_that_they_did_not_see(capture, scale):
    found = held_out(capture, "mlp_out", *CELL, scale=scale)
    X = capture.mlp_out.sel(layer=CELL[0], position=CELL[1]).values.astype(float)
    inside = np.flatnonzero(found.fold.values >= 0)
    fold = found.fold.values[inside]
    by_hand = (X[inside] * found.coef.values[fold]).sum(1) + found.intercept.values[fold]
    np.testing.assert_allclose(by_hand, found.score.values[inside], rtol=1e-9, atol=1e-9)
