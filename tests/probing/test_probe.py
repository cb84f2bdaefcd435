"""A probe that is kept: what it scores, how it is saved, and what it refuses."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from hiddenlake.cache.errors import BadInputError, IdentityError, ProbeError, StoreError
from hiddenlake.probing import probe as module
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.probe import Probe, different_fields, load_probe, score_capture, score_rows
from hiddenlake.probing.train import fit_probe


@pytest.fixture(scope="module")
def capture(make_capture):
    data = make_capture()
    data.attrs |= {"weights": "sha256:1", "decoding.max_new_tokens": 32, "decoding.sampling": "greedy"}
    return data


@pytest.fixture(scope="module")
def probe(capture):
    return fit_probe(capture, "mlp_out", 1, "exact_answer_last", C=0.1, tol=1e-12)


def cell(capture):
    X = capture.mlp_out.sel(layer=1, position="exact_answer_last").values
    there = np.isfinite(X).all(axis=1)
    return X, there, ~capture.correct.values


@pytest.mark.parametrize("scale", ["none", "rms", "feature"])
def test_its_scores_are_scikit_learns_on_the_stored_activations(capture, scale):
    X, there, wrong = cell(capture)
    probe = fit_probe(capture, "mlp_out", 1, "exact_answer_last", C=0.1, scale=scale, tol=1e-13)
    rows = X[there].astype(np.float64)
    rows = rows - rows.mean(axis=0)
    rows = {"none": rows, "rms": rows / np.sqrt(rows.var(axis=0).mean()), "feature": rows / rows.std(axis=0)}[scale]
    model = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(rows, wrong[there])
    np.testing.assert_allclose(probe.decision_function(X[there]), model.decision_function(rows), rtol=1e-4, atol=1e-4)
    assert probe.fit["converged"] and probe.fit["n"] == there.sum() and probe.fit["n_positive"] == wrong[there].sum()


def test_it_knows_what_cross_validation_says(capture, probe):
    grid = fit_grid(capture, "mlp_out", layers=[1], positions=["exact_answer_last"], C=(0.1,), tol=1e-12, shuffles=0)
    assert probe.fit["auc"] == float(grid.auc.item()) and probe.fit["auc_lo"] == float(grid.auc_lo.item())
    assert probe.positive_class == grid.attrs["positive_class"] == "wrong"
    assert probe.identity["decoding"] == {"max_new_tokens": 32, "sampling": "greedy"}


def test_it_is_scikit_learns(capture, probe):
    X, there, _ = cell(capture)
    model = probe.to_sklearn()
    np.testing.assert_allclose(
        model.decision_function(X[there]), probe.decision_function(X[there]), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(model.predict_proba(X[there]), probe.predict_proba(X[there]), rtol=1e-6, atol=1e-9)
    assert (model.predict(X[there]) == probe.predict(X[there])).all()
    assert probe.coef_.shape == (1, 12) and probe.intercept_.shape == (1,) and probe.classes_.tolist() == [False, True]
    assert isinstance(model, LogisticRegression) and model.n_features_in_ == 12


def test_it_is_the_same_after_it_was_saved(probe, tmp_path):
    path = probe.save(tmp_path / "folder" / "probe.safetensors")
    again = load_probe(path)
    assert (again.coef == probe.coef).all() and again.intercept == probe.intercept
    for name in ("site", "layer", "position", "label", "positive_class", "identity", "fit"):
        assert getattr(again, name) == getattr(probe, name)
    probe.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_safetensors_reads_it(probe, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = probe.save(tmp_path / "probe.safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        assert (file.get_tensor("coef") == probe.coef).all()
        assert json.loads(file.metadata()["hiddenlake.probe"])["fit"] == probe.fit


def test_other_files_are_refused(probe, tmp_path):
    path = probe.save(tmp_path / "probe.safetensors")
    whole = path.read_bytes()
    for broken, message in (
        (whole[:-4], "safetensors"),
        (whole.replace(b"hiddenlake.probe", b"hiddenlake.qrobe"), "holds no probe"),
        (whole.replace(b'format\\": 1', b'format\\": 7'), "another version"),
        (whole.replace(b'label\\"', b'babel\\"'), "holds no probe"),
        (whole[:-8] + np.array([np.nan]).tobytes(), "finite float64"),
        (b"", "safetensors"),
    ):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(BadInputError, match=message):
            load_probe(path)
    with pytest.raises(BadInputError):
        load_probe(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not saved"):
        probe.save(tmp_path / "file" / "probe.safetensors")


def test_activations_of_another_width_are_refused(probe):
    with pytest.raises(ProbeError, match=r"expected \(n, 12\)"):
        probe.decision_function(np.zeros((3, 11)))


def test_a_cell_without_a_probe_says_why(capture):
    with pytest.raises(ProbeError, match="no positive sample"):
        fit_probe(capture.isel(sample=slice(0, 12)), "mlp_out", 1, "exact_answer_last", cv=5)


def test_identities_differ_in_what_makes_numbers():
    one = {"model": "a", "weights": "1", "lora": None, "task": "x", "judge": "y", "decoding": {"max_new_tokens": 1}}
    assert different_fields(one, one | {"task": "z", "judge": "w", "decoding": {"max_new_tokens": 2}}) == []
    assert different_fields(one, one | {"weights": "2", "compute_dtype": "float16"}) == ["compute_dtype", "weights"]
    assert different_fields(one, {name: value for name, value in one.items() if name != "lora"}) == []


@pytest.fixture
def stored(tmp_path):
    """A small capture on disk."""
    from hiddenlake.cache.store.backend import open_backend
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.cache.testing import small

    place = open_backend(tmp_path / "lake" / "small")
    with small.open_small(place, 6, "cells") as writer:
        writer.reserve([small.key(i) for i in range(6)], 6)
        for i in range(6):
            small.add(writer, i)
    return open_capture(tmp_path / "lake" / "small")


def test_a_capture_is_scored_sample_by_sample(stored):
    layer, position = int(stored.dataset().layer[0]), str(stored.dataset().position.values[0])
    X = stored.read("resid_post", layer, position, dtype="float32")
    there = np.isfinite(X).all(axis=1)
    rng = np.random.default_rng(0)
    probe = Probe(
        rng.standard_normal(X.shape[1]), 0.3, "resid_post", layer, position, "correct", "wrong", dict(stored.identity)
    )
    found = score_capture(probe, stored)
    assert found.sample.values.tolist() == list(stored.keys)
    np.testing.assert_allclose(found.score.values[there], X[there].astype(np.float64) @ probe.coef + 0.3)
    np.testing.assert_allclose(found.probability.values[there], 1 / (1 + np.exp(-found.score.values[there])))
    assert found.score.isnull().values.tolist() == (~there).tolist() and not found.attrs["forced"]


def test_blocks_and_rows_change_nothing(stored, monkeypatch):
    layer, position = int(stored.dataset().layer[0]), str(stored.dataset().position.values[0])
    width = stored.read("resid_post", layer, position).shape[1]
    probe = Probe(
        np.arange(width, dtype=float), 0.3, "resid_post", layer, position, "correct", "wrong", dict(stored.identity)
    )
    whole = score_capture(probe, stored).score.values
    monkeypatch.setattr(module, "_BLOCK", 2)
    np.testing.assert_allclose(score_rows(probe, stored, np.array([5, 0, 3, 1, 3])), whole[[5, 0, 3, 1, 3]], rtol=1e-12)


def test_a_capture_of_another_identity_is_refused_unless_forced(stored):
    layer, position = int(stored.dataset().layer[0]), str(stored.dataset().position.values[0])
    width = stored.read("resid_post", layer, position).shape[1]
    probe = Probe(
        np.ones(width),
        0.0,
        "resid_post",
        layer,
        position,
        "correct",
        "wrong",
        dict(stored.identity) | {"weights": "other"},
    )
    with pytest.raises(IdentityError, match="weights differ"):
        score_capture(probe, stored)
    marked = score_capture(probe, stored, force=True)
    assert marked.attrs["forced"] and marked.attrs["differs"] == "weights"
