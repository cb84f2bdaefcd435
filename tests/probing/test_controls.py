"""Controls: they know what they say they know, and nothing of the order of the samples."""

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.controls import PLACE, control_task, place_features, random_features, token_types
from hiddenlake.probing.grid import fit_grid


def test_types_are_the_tokens_at_the_positions(make_capture):
    data = make_capture(n=40)
    types = token_types(data)
    for p, position in enumerate(data.position.values):
        for sample in range(40):
            index = int(data.token_index.sel(position=position)[sample])
            assert types[p, sample] == (data.token_ids.values[sample][index] if index >= 0 else -1)
    pooled = data.assign(token_index=xr.full_like(data.token_index, -2))
    assert (token_types(pooled) == -1).all()
    with pytest.raises(ProbeError, match="leave the controls `random` and `task` out"):
        token_types(data.drop_vars("token_ids"))


def test_a_control_task_is_a_function_of_the_token_with_the_labels_share():
    rng = np.random.default_rng(0)
    types = np.stack([rng.integers(0, 200, 1000), np.full(1000, 7), rng.integers(0, 2, 1000)])
    types[0, :50] = -1
    positive, inside = rng.random(1000) < 0.3, np.ones((3, 1000), bool)
    task = control_task(types, positive, inside)
    for name in range(200):
        assert len(set(task[0, types[0] == name].tolist())) <= 1
    assert task[0].sum() == pytest.approx(positive[50:].sum(), abs=10) and not task[0, :50].any()
    assert not task[1].any() and 0 < task[2].sum() < 1000
    order = rng.permutation(1000)
    assert (control_task(types[:, order], positive[order], inside) == task[:, order]).all()
    assert (control_task(types, positive, inside, seed=1) != task).any()
    assert abs(np.corrcoef(task[0, 50:], positive[50:])[0, 1]) < 0.15


def test_random_features_are_of_the_token_and_lazy():
    types = np.array([[5, 9, 5, -1], [9, 9, 7, 5]])
    features = random_features(types, 64, seed=3, positions=np.array(["a", "b"]))
    values = features.values
    assert values.shape == (2, 4, 64) and values.dtype == np.float32
    np.testing.assert_array_equal(values[0, 0], values[0, 2])
    np.testing.assert_array_equal(values[0, 1], values[1, 0])
    np.testing.assert_array_equal(values[0, 0], values[1, 3])
    assert np.isnan(values[0, 3]).all() and abs(np.corrcoef(values[0, 0], values[0, 1])[0, 1]) < 0.5
    np.testing.assert_array_equal(features.sel(position="b").isel(sample=[2, 0]).values, values[1, [2, 0]])
    assert not np.allclose(
        random_features(types, 64, seed=4, positions=np.array(["a", "b"])).values[0, 0], values[0, 0]
    )


def test_place_features_are_numbers_of_the_place(make_capture):
    data = make_capture(n=50)
    features = place_features(data)
    at = dict(zip(PLACE, np.moveaxis(features.sel(position="-1").values, -1, 0), strict=True))
    assert (at["tokens behind it"] == 0).all() and (at["prompt length"] == data.prompt_length).all()
    assert (at["token index"] == data.total_length - 1).all() and (
        at["index in the answer"] == at["answer length"] - 1
    ).all()
    absent = data.token_index.sel(position="second_answer").values < 0
    assert absent.any() and (np.isnan(features.sel(position="second_answer").values).all(axis=1) == absent).all()
    pooled = place_features(data.assign(token_index=xr.full_like(data.token_index, -2)))
    assert (pooled.values[..., 0] == data.prompt_length.values).all() and (pooled.values[..., 4:] == 0).all()


def test_each_control_takes_what_it_knows_from_the_probe(make_capture):
    data = make_capture(n=400, n_layers=1, signal=None)
    # the label is the length of the answer, and the layer holds nothing but which token it is
    longer = (data.total_length - data.prompt_length).values >= 4
    types = token_types(data)
    vectors = np.random.default_rng(1).standard_normal((20, 12)).astype(np.float32)
    known = np.where(types[..., None] >= 0, vectors[types], np.nan)[None]
    data = data.assign(correct=("sample", longer), mlp_out=(data.mlp_out.dims, known))
    grid = fit_grid(data, "mlp_out", positions=["first_answer"], C=1.0)
    at = grid.isel(layer=0, position=0, C=0)
    assert float(at.place_auc) > 0.95
    assert abs(float(at.auc) - 0.5) < 0.15 and abs(float(at.random_auc) - 0.5) < 0.15
    # 20 tokens in 12 dimensions: most labels of tokens can be memorised
    assert float(at.control_task_auc) > 0.85
    assert float(at.selectivity) == pytest.approx(float(at.auc - at.control_task_auc))
    assert grid.attrs["place_converged"] and grid.attrs["random_converged"]


def test_a_token_that_is_always_the_same_has_no_control_task(make_capture):
    grid = fit_grid(make_capture(n=200), "mlp_out", positions=["last_q", "-1"], layers=[0], shuffles=1).squeeze()
    assert np.isnan(grid.control_task_auc.sel(position="last_q")) and np.isnan(grid.selectivity.sel(position="last_q"))
    assert float(grid.random_auc.sel(position="last_q")) == 0.5 and bool(grid.converged.all())
    assert np.isfinite(grid.selectivity.sel(position="-1"))
    assert grid.label_set.values.tolist() == ["label", "shuffled_0"]


def test_controls_may_be_left_out(make_capture):
    data = make_capture(n=120, n_layers=1, signal=None)
    grid = fit_grid(data.drop_vars("token_ids"), "mlp_out", positions=["-1"], controls=("place",))
    assert "place_auc" in grid and not {"token_auc", "random_auc", "control_task_auc", "selectivity"} & set(grid)
