"""fit_grid: which samples are in a cell, groups, controls, the best cell, and saving."""

import warnings

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.errors import BadInputError, ProbeError, StoreError, UnknownNameError
from hiddenlake.probing.grid import best_cell, fit_grid, open_grid, save_grid
from hiddenlake.probing.reference import compare_to_csv, read_reference


@pytest.fixture(scope="module")
def capture(make_capture):
    return make_capture(n=300)


@pytest.fixture(scope="module")
def grid(capture):
    return fit_grid(capture, "mlp_out")


def test_a_planted_signal_is_found_and_shuffles_find_nothing(grid):
    best = best_cell(grid)
    assert (best.layer, best.position, best.C) == (1, "exact_answer_last", 0.01)
    assert best.auc > 0.9 and best.auc_lo < best.auc < best.auc_hi
    assert grid.attrs["best_layer"] == 1 and grid.attrs["best_auc"] == best.auc
    elsewhere = grid.auc.where((grid.layer != 1) | (grid.position != "exact_answer_last"))
    assert float(elsewhere.max()) < 0.7 and abs(float(elsewhere.mean()) - 0.5) < 0.05
    assert abs(float(grid.shuffled_auc.mean()) - 0.5) < 0.05
    assert grid.converged.all() and grid.attrs["n_not_converged"] == 0 and grid.attrs["max_relative_gap"] <= 1e-6


def test_noise_has_a_best_cell_that_a_nested_choice_takes_back(make_capture):
    capture = make_capture(n=150, n_layers=8, signal=None)
    grid = fit_grid(capture, "mlp_out")
    assert best_cell(grid).auc > 0.57
    assert grid.attrs["nested_auc"] < best_cell(grid).auc - 0.05
    assert grid.attrs["nested_auc_lo"] < 0.5 < grid.attrs["nested_auc_hi"]
    assert "biased upwards" in grid.attrs["note"] and f"best of {grid.attrs['n_cells']}" in grid.attrs["note"]
    without = fit_grid(capture, "mlp_out", layers=[0], nested=False)
    assert "nested_auc" not in without.attrs and "inner_auc" not in without


def test_a_planted_signal_is_what_a_nested_choice_chooses(grid):
    assert grid.attrs["nested_layers"] == [1] * 5 and grid.attrs["nested_positions"] == ["exact_answer_last"] * 5
    assert grid.attrs["nested_auc"] == pytest.approx(best_cell(grid).auc)
    assert grid.attrs["nested_auc_hi"] == pytest.approx(best_cell(grid).auc_hi)


def test_a_cell_counts_what_lies_in_the_answer(capture, grid):
    correct, valid = capture.correct.values, capture.exact_answer_valid.values
    for position in capture.position.values:
        inside = capture.token_index.sel(position=position).values >= 0
        if position != "last_q":
            inside &= capture.in_answer.sel(position=position).values
        cell = grid.sel(layer=0, position=position)
        assert (int(cell.n_correct), int(cell.n_wrong)) == ((inside & correct).sum(), (inside & ~correct).sum())
        assert float(cell.valid_share_wrong) == pytest.approx(valid[inside & ~correct].mean())
        assert float(cell.kept_share_correct) == pytest.approx((inside & correct).sum() / correct.sum())
    assert float(grid.valid_share_wrong.sel(layer=0, position="exact_answer_last")) == 1.0


def test_the_token_identity_control_sees_the_token_only(make_capture):
    capture = make_capture(n=400, signal=None)
    wrong = ~capture.correct.values
    embed = capture.embed.values.copy()
    position = capture.position.values.tolist().index("first_answer")
    vocabulary = np.unique(embed[position], axis=0)
    # The answer's first token says whether it is wrong: the probe of a deep layer must not get the credit.
    embed[position] = vocabulary[np.where(wrong, 0, 1)]
    grid = fit_grid(capture.assign(embed=(capture.embed.dims, embed)), "mlp_out", layers=[0])
    control = grid.token_auc.squeeze("C")
    assert float(control.sel(position="first_answer")) == 1.0
    assert float(control.sel(position="last_q")) == 0.5
    assert (grid.token_auc_lo <= grid.token_auc).all() and grid.attrs["token_converged"]


@pytest.mark.parametrize(
    ("groups", "n_groups", "interval"),
    [("group", 300, "DeLong"), (None, 300, "DeLong"), ("gold", 17, "bootstrap"), ("answer_language", 12, "bootstrap")],
)
def test_groups_are_named(capture, groups, n_groups, interval):
    language = np.array([f"language {i % 12}" for i in range(300)], object)
    capture = capture.assign(answer_language=("sample", language))
    grid = fit_grid(capture, "mlp_out", groups=groups, layers=[1], positions=["-1"])
    assert grid.attrs["n_groups"] == n_groups and interval in grid.attrs["interval"]
    assert grid.attrs["groups"] == (groups or "question")


def test_an_empty_group_is_its_question(capture):
    empty = capture.assign(group=("sample", np.array([""] * 300, object)))
    assert fit_grid(empty, "mlp_out", layers=[1], positions=["-1"]).attrs["n_groups"] == 300


def test_resampled_answers_stay_with_their_question(make_capture):
    capture = make_capture(n=200)
    capture = capture.assign(index=("sample", np.arange(200) // 4), sample_index=("sample", np.arange(200) % 4))
    grid = fit_grid(capture, "mlp_out", groups=None, layers=[1], positions=["-1"])
    assert grid.attrs["n_groups"] == 50 and "bootstrap" in grid.attrs["interval"]


def test_another_label_with_gaps(capture):
    values = np.array([None, True, False], object)[np.arange(300) % 3]
    grid = fit_grid(capture.assign(hedged=("sample", values)), "mlp_out", label="hedged", layers=[0], positions=["-1"])
    assert grid.attrs["n"] == 200 and grid.attrs["n_unlabelled"] == 100
    assert int(grid.n_positive.squeeze()) == 100 and "valid_share_positive" in grid and "n_wrong" not in grid
    assert grid.attrs["positive_class"] == "hedged is true"


def test_the_order_of_the_capture_changes_nothing(capture, grid):
    order = np.random.default_rng(3).permutation(300)
    again = fit_grid(capture.isel(sample=order), "mlp_out")
    for name in ("auc", "auc_lo", "shuffled_auc", "token_auc", "objective"):
        xr.testing.assert_allclose(grid[name], again[name], rtol=1e-6)


def test_a_part_of_the_grid_is_the_same_numbers(capture, grid):
    part = fit_grid(capture, "mlp_out", layers=[2, 1], positions=["-1", "last_q"])
    assert part.layer.values.tolist() == [2, 1] and part.position.values.tolist() == ["-1", "last_q"]
    xr.testing.assert_allclose(part.auc, grid.auc.sel(layer=[2, 1], position=["-1", "last_q"]))


def test_progress_counts_the_controls_too(capture):
    seen = []
    fit_grid(capture, "mlp_out", positions=["-1", "last_q"], progress=lambda done, n: seen.append((done, n)))
    assert seen == [(i, 12) for i in range(1, 13)]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"site": "mlp"}, UnknownNameError, "unknown site 'mlp'"),
        ({"site": "blocks.*.hook_mlp_out"}, UnknownNameError, "name the site itself"),
        ({"site": "attn_out"}, UnknownNameError, "the capture has no site 'attn_out': it has mlp_out"),
        ({"site": "embed"}, UnknownNameError, "the capture has no site 'embed'"),
        ({"site": "blocks.1.mlp.hook_out"}, UnknownNameError, r"layers=\[1\]"),
        ({"label": "verdict"}, UnknownNameError, "no column 'verdict': the samples have answers, correct"),
        ({"label": "total_length"}, ProbeError, "expected true and false, or 1 and 0"),
        ({"groups": "country"}, UnknownNameError, "no column 'country': groups are `gold`, None, or one of"),
        ({"layers": [9]}, UnknownNameError, r"no layer \[9\]: it has \[0, 1, 2\]"),
        ({"positions": []}, UnknownNameError, "none named"),
        ({"groups": "gold", "cv": 20}, ProbeError, "17 groups cannot fill 20 folds: use cv=17 or fewer"),
        ({"controls": ("token", "noise")}, UnknownNameError, "unknown controls noise: expected some of token, place"),
        ({"compat": "paper"}, UnknownNameError, "unknown compat 'paper'"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_in_a_sentence(capture, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        fit_grid(capture, **({"site": "mlp_out"} | arguments))


def test_a_grid_survives_the_disk(grid, tmp_path):
    path = tmp_path / "grids" / "one.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_grid(grid, path) == path
        save_grid(grid, path)  # replaces it
        again = open_grid(path)
        with xr.open_zarr(path) as plain:
            assert plain.auc.dims == ("layer", "position", "C")
    xr.testing.assert_identical(grid, again)
    assert [p.name for p in path.parent.iterdir()] == ["one.zarr"]


def test_saving_never_replaces_what_is_no_grid(grid, tmp_path):
    (tmp_path / "papers").mkdir()
    with pytest.raises(StoreError, match="is no Zarr group"):
        save_grid(grid, tmp_path / "papers")
    with pytest.raises(StoreError, match="holds no grid"):
        open_grid(tmp_path / "papers")


def test_a_grid_without_probes_has_no_best_cell(make_capture):
    grid = fit_grid(make_capture(n=60, positions=("-8",), signal=None), "mlp_out")
    assert grid.attrs["n_cells"] == 0 and "no cell was fitted" in grid.attrs["note"]
    with pytest.raises(ProbeError, match="no cell of 3 x 1 was fitted: no sample has this token"):
        best_cell(grid)


CSV = "layer,last_q,-1\n0,0.501,0.6\n1,0.7,\n5,0.8,0.9\n"


def test_a_published_grid_beside_ours(grid, tmp_path):
    (tmp_path / "paper.csv").write_text(CSV)
    reference = read_reference(tmp_path / "paper.csv")
    assert reference.sel(layer=5, position="-1") == 0.9 and np.isnan(reference.sel(layer=1, position="-1"))
    both = compare_to_csv(grid, tmp_path / "paper.csv")
    assert both.layer.values.tolist() == [0, 1, 2, 5] and both.sizes["position"] == grid.sizes["position"]
    ours = float(grid.auc.sel(layer=0, position="-1").squeeze())
    assert float(both.difference.sel(layer=0, position="-1")) == pytest.approx(ours - 0.6)
    assert int(both.difference.notnull().sum()) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "line 1"), ("a,b\n", "found 'a,b', expected `layer`"), ("layer,a\n0\n", "line 2: 1 fields, expected 2"),
     ("layer,a\nx,0.5\n", "line 2: invalid literal")],
)  # fmt: skip
def test_a_csv_that_is_no_grid_is_named_by_its_line(tmp_path, text, sentence):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(BadInputError, match=sentence):
        read_reference(tmp_path / "bad.csv")


def test_class_weights_reach_the_cells_and_the_control(capture):
    plain, balanced = (
        fit_grid(capture, "mlp_out", layers=[1], positions=["-1"], class_weight=w) for w in (None, "balanced")
    )
    assert balanced.attrs["class_weight"] == "balanced" and balanced.converged.all()
    for name in ("objective", "token_auc"):
        assert not np.allclose(plain[name], balanced[name], rtol=1e-9), name


def test_two_folds_are_too_few_for_a_nested_choice_but_not_for_a_grid(make_capture):
    arguments = {"layers": [1], "positions": ["-1"], "cv": 2}
    grid = fit_grid(make_capture(n=60), "mlp_out", **arguments)
    assert np.isfinite(grid.auc).all() and "nested_auc" not in grid.attrs
    with pytest.raises(ProbeError, match="3 folds"):
        fit_grid(make_capture(n=60), "mlp_out", nested=True, **arguments)
