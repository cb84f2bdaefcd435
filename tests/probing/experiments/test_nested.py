"""A choice is judged on what it did not see."""

import numpy as np
import pytest

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.experiments.nested import Settings, cells_of, design_of, fold_auc, held_out_scores, nested_grid
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.held_out import held_out
from hiddenlake.probing.selection import select

SETTINGS = Settings()


def chosen_of(data, **options):
    return select(data, "mlp_out", label="correct", groups="group", **options)


def test_scores_of_one_cell_are_those_of_its_cross_validation(make_capture):
    data = make_capture()
    chosen = chosen_of(data)
    design = design_of(chosen, SETTINGS)
    found = held_out_scores(chosen, design, [(1, "exact_answer_last")] * 5)
    known = held_out(data, "mlp_out", 1, "exact_answer_last")
    np.testing.assert_array_equal(found.score, known.score.values)
    assert found.converged and found.relative_gap <= SETTINGS.tol and found.named == "1 exact_answer_last"
    auc = fold_auc(found.score, chosen.positive, design)
    cell = fit_grid(data, "mlp_out", layers=[1], positions=["exact_answer_last"], shuffles=0)
    assert (auc.auc, auc.lo, auc.hi) == tuple(float(cell[name].item()) for name in ("auc", "auc_lo", "auc_hi"))
    assert (auc.n_positive, auc.n_negative) == (int(cell.n_wrong.item()), int(cell.n_correct.item()))


def test_groups_that_repeat_are_drawn_as_a_whole(make_capture):
    data = make_capture()
    data["group"] = "sample", np.array([f"pair {i // 2}" for i in range(240)], object)
    chosen = chosen_of(data)
    design = design_of(chosen, SETTINGS)
    auc = fold_auc(held_out_scores(chosen, design, [(1, "-1")] * 5).score, chosen.positive, design)
    cell = fit_grid(data, "mlp_out", layers=[1], positions=["-1"], shuffles=0, controls=(), nested=False)
    assert design.group is not None
    assert [auc.auc, auc.lo, auc.hi] == pytest.approx([cell[name].item() for name in ("auc", "auc_lo", "auc_hi")])


def test_each_fold_takes_the_cell_that_the_others_chose(make_capture):
    data = make_capture(n=200)
    parts = {"positions": ["-1", "exact_answer_last"]}
    chosen = chosen_of(data, **parts)
    assert cells_of(nested_grid(chosen, SETTINGS)) == [(1, "exact_answer_last")] * 5


def test_mixed_cells_are_stitched_by_fold(make_capture):
    chosen = chosen_of(make_capture())
    design = design_of(chosen, SETTINGS)
    cells = [(1, "exact_answer_last"), (0, "-1"), (1, "exact_answer_last"), (2, "last_q"), (0, "-1")]
    found = held_out_scores(chosen, design, cells)
    for f, cell in enumerate(cells):
        alone = held_out_scores(chosen, design, [cell] * 5)
        np.testing.assert_array_equal(found.score[design.fold == f], alone.score[design.fold == f])


def test_another_label_on_the_same_folds(make_capture):
    data = make_capture()
    chosen = chosen_of(data)
    design = design_of(chosen, SETTINGS)
    feature = data.mlp_out.sel(layer=0, position="last_q").values[:, 4]
    other = feature > np.median(feature)
    auc = fold_auc(held_out_scores(chosen, design, [(0, "last_q")] * 5, other).score, other, design)
    assert auc.auc > 0.8 and auc.n_positive == other.sum()


def test_noise_is_not_found_by_looking_everywhere(make_capture):
    data = make_capture(n=200, n_layers=6, signal=None, seed=3)
    chosen = chosen_of(data)
    design = design_of(chosen, SETTINGS)
    cells = cells_of(nested_grid(chosen, SETTINGS))
    auc = fold_auc(held_out_scores(chosen, design, cells).score, chosen.positive, design)
    assert auc.lo < 0.5 < auc.hi


def test_too_few_samples_are_said(make_capture):
    chosen = chosen_of(make_capture())
    design = design_of(chosen, SETTINGS)
    rare = np.zeros(240, bool)
    rare[:3] = True
    with pytest.raises(ProbeError, match="too few samples"):
        held_out_scores(chosen, design, [(0, "last_q")] * 5, rare)
    assert "too few samples" in fold_auc(np.zeros(240), rare, design).reason
