"""compat="llmsknow" against the same calls made here, from the published description."""

import random
import warnings

import numpy as np
import pytest
from sklearn import metrics
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.grid import fit_grid


def published_cell(capture, layer, position, seed):
    """The published code's steps, on a capture's arrays. None where it would not get to a metric."""
    random.seed(seed)
    np.random.seed(seed)
    indices = np.arange(capture.sizes["sample"])
    np.random.shuffle(indices)
    indices = indices[:1000]
    train, valid = train_test_split(indices, test_size=0.2, random_state=seed)
    is_valid = capture.exact_answer_valid.values == 1
    X = capture.mlp_out.sel(layer=layer, position=position).values.copy()
    there = capture.token_index.sel(position=position).values >= 0
    if position == "exact_answer_after_last":
        last = capture.mlp_out.sel(layer=layer, position="-1").values
        X[~there] = last[~there]
        there = there | is_valid
    train, valid = (part[is_valid[part] & there[part]] for part in (train, valid))
    y = capture.correct.values.astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        clf = LogisticRegression(random_state=seed).fit(X[train], y[train])
    prediction, probability = clf.predict(X[valid]), clf.predict_proba(X[valid])[:, 0]
    fpr, tpr, _ = metrics.roc_curve(y[valid], probability, pos_label=0)
    baseline = max(y[valid].mean(), (1 - y[valid]).mean())
    accuracy = (prediction == y[valid]).mean()
    return {
        "auc": metrics.auc(fpr, tpr),
        "accuracy": accuracy,
        "accuracy_above_baseline": accuracy - baseline,
        "f1": metrics.f1_score(y[valid], prediction, pos_label=0),
        "precision": metrics.precision_score(y[valid], prediction, pos_label=0, zero_division=0),
        "recall": metrics.recall_score(y[valid], prediction, pos_label=0),
        "n_train": len(train),
        "n_validation": len(valid),
        "n_iter": clf.n_iter_.max(),
    }


@pytest.mark.parametrize(("n", "seed"), [(300, 0), (1300, 26)])
def test_every_cell_equals_the_published_calls(make_capture, n, seed):
    capture = make_capture(n=n, n_layers=2, seed=seed)
    grid = fit_grid(capture, "mlp_out", compat="llmsknow", seed=seed)
    for layer in capture.layer.values:
        for position in capture.position.values:
            cell = grid.sel(layer=layer, position=position).squeeze("C")
            for name, expected in published_cell(capture, layer, position, seed).items():
                assert float(cell[name]) == pytest.approx(expected, abs=1e-6), (layer, position, name)
    assert grid.attrs["compat"] == "llmsknow"
    assert grid.auc_lo.notnull().all() and (grid.auc_lo <= grid.auc).all() and (grid.auc <= grid.auc_hi).all()


def test_it_says_what_it_did(make_capture):
    capture = make_capture(n=300)
    grid = fit_grid(capture, "mlp_out", compat="llmsknow")
    assert not grid.converged.all() and (grid.gap_bound > 0).all()
    assert grid.attrs["n_not_converged"] > 0 and "lbfgs, max_iter 100" in grid.attrs["solver"]
    valid = capture.exact_answer_valid.values
    ends = valid & (capture.token_index.sel(position="exact_answer_after_last").values < 0)
    assert int(grid.n_last_token_instead.sel(position="exact_answer_after_last")) == ends.sum()
    assert f"{ends.sum()} samples" in grid.attrs["fallback"]
    short = valid & (capture.token_index.sel(position="second_answer").values < 0)
    assert int(grid.n_left_out.sel(position="second_answer")) == short.sum() > 0
    assert grid.attrs["n_dropped"] == (~valid).sum()
    assert "240 training and 60 validation rows of 300" in grid.attrs["split"]
    assert (grid.valid_share_wrong == 1.0).all()


def test_without_the_last_token_nothing_is_put_in_its_place(make_capture):
    capture = make_capture(n=300)
    grid = fit_grid(capture, "mlp_out", compat="llmsknow", positions=["exact_answer_last", "exact_answer_after_last"])
    assert (grid.n_last_token_instead == 0).all()
    assert int(grid.n_left_out.sel(position="exact_answer_after_last")) > 0


def test_positions_in_the_prompt_count(make_capture):
    capture = make_capture(n=300, positions=("-8", "-1"), signal=None)
    assert not capture.in_answer.sel(position="-8").any()
    assert (fit_grid(capture, "mlp_out").reason.sel(position="-8") == "no sample has this token").all()
    assert fit_grid(capture, "mlp_out", compat="llmsknow").auc.sel(position="-8").notnull().all()


def test_one_class_is_a_reason_and_too_few_samples_an_error(make_capture):
    capture = make_capture(n=60)
    y = np.zeros(60, bool)
    y[0] = True
    result = fit_probes(capture.mlp_out, y, mask=capture.token_index.values >= 0, compat="llmsknow")
    assert result.auc.isnull().all() and all("one class only in the" in r for r in result.reason.values.ravel())
    with pytest.raises(ProbeError, match="3 samples cannot be split"):
        fit_probes(capture.mlp_out[..., :3, :], y[:3], compat="llmsknow")


def test_without_a_mask_what_is_finite_counts(make_capture):
    capture = make_capture(n=200)
    y = ~capture.correct.values
    masked = fit_probes(capture.mlp_out, y, mask=capture.token_index.values >= 0, compat="llmsknow")
    assert masked.identical(fit_probes(capture.mlp_out, y, compat="llmsknow"))
