"""What a grid says of itself is enough to fit it again."""

import pytest

from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.held_out import held_out
from hiddenlake.probing.report import facts


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": None, "class_weight": {False: 1.0, True: 3.0}, "scale": "rms", "seed": 3, "cv": 4},
        {"groups": "gold", "class_weight": "balanced", "penalty": "elasticnet", "l1_ratio": 0.5, "C": 0.1},
        {"penalty": "l1", "C": 0.1, "solver": "sklearn"},
    ],
)
def test_the_arguments_are_those_of_the_grid(make_capture, settings):
    capture = make_capture(n=120)
    grid = fit_grid(capture, "mlp_out", layers=[1], positions=["exact_answer_last"], **settings)
    found = held_out(capture, "mlp_out", 1, "exact_answer_last", C=float(grid.C[0]), **facts.arguments(grid))
    assert found.attrs["auc"] == pytest.approx(float(grid.auc.squeeze()), abs=1e-9)
    for name in ("cv", "scale", "seed", "tol", "class_weight", "l1_ratio", "groups", "label", "solver"):
        assert found.attrs[name] == grid.attrs[name]


def test_inner_scores_are_no_controls(make_capture):
    grid = fit_grid(make_capture(n=120), "mlp_out", layers=[1])
    assert "inner_auc" in grid and facts.control_names(grid) == list(facts.CONTROLS)
    assert [name for name, _ in facts.settings(grid) if name.startswith(("best_", "capture"))] == []
