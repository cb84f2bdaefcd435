"""Probes that are tested on other tasks."""

import numpy as np
import pytest

from hiddenlake.cache.errors import BadInputError, IdentityError
from hiddenlake.cache.store import open_capture
from hiddenlake.probing.experiments.transfer import transfer
from hiddenlake.probing.experiments.transfer_plot import draw_transfer
from hiddenlake.probing.grid import fit_grid

POSITIONS = ("exact_answer_first", "exact_answer_last", "-1")


@pytest.fixture(scope="module")
def lake(make_capture, store_capture, tmp_path_factory):
    """Two tasks that say errors in the same way, and one that says them the other way round, of which 50 are the first's."""
    folder = tmp_path_factory.mktemp("lake")
    made = {}
    for seed, (name, n, positions) in enumerate(
        [("one", 160, POSITIONS), ("two", 140, ("last_q", *POSITIONS)), ("three", 150, POSITIONS)]
    ):
        data = make_capture(n=n, positions=positions, strength=-1.5 if name == "three" else 1.5, seed=seed)
        groups = [f"{'one' if name == 'three' and i < 50 else name} {i}" for i in range(n)]
        data["group"] = "sample", np.array(groups, object)
        identity = {"model": "m/x", "weights": "1", "task": name}
        made[name] = open_capture(store_capture(data, folder / name, identity))
    return made


@pytest.fixture(scope="module")
def table(lake):
    return transfer(list(lake.values()), "mlp_out")


def by_pair(table):
    return {(row["train"], row["test"]): row for row in table.rows}


def test_every_pair_is_there_and_signals_carry_over(table):
    rows = by_pair(table)
    assert len(rows) == 9 == len(table.rows) and table.facts["tasks"] == ["one", "two", "three"]
    assert rows["one", "one"]["AUC"] > 0.85 and rows["one", "two"]["AUC"] > 0.85 and rows["two", "one"]["AUC"] > 0.85
    assert rows["one", "three"]["AUC"] < 0.15 and rows["three", "three"]["AUC"] > 0.85
    assert {row["cell"] for row in table.rows} == {"1 exact_answer_last"}
    for row in table.rows:
        assert row["baseline"] == 0.5  # all log-probabilities are the same
        lo, hi = map(float, row["95 %"].split(" to "))
        assert lo <= row["AUC"] <= hi and row["above baseline"] == pytest.approx(row["AUC"] - 0.5, abs=1e-3)


def test_shared_prompts_are_dropped_from_the_tested_side(table, lake):
    rows = by_pair(table)
    assert rows["one", "three"]["dropped"] + rows["one", "three"]["n wrong"] + rows["one", "three"]["n correct"] == (
        rows["two", "three"]["n wrong"] + rows["two", "three"]["n correct"]
    )
    assert 30 < rows["one", "three"]["dropped"] <= 50 and 30 < rows["three", "one"]["dropped"] <= 50
    assert rows["two", "three"]["dropped"] == rows["one", "two"]["dropped"] == rows["one", "one"]["dropped"] == 0


def test_the_targets_cell_and_turned_aucs_are_said(lake):
    table = transfer([lake["one"], lake["three"]], "mlp_out", choose="target", compat="llmsknow")
    rows = by_pair(table)
    plain = by_pair(transfer([lake["one"], lake["three"]], "mlp_out"))
    assert rows["one", "three"]["AUC"] == pytest.approx(1 - plain["one", "three"]["AUC"], abs=1e-3)
    lo, hi = map(float, rows["one", "three"]["95 %"].split(" to "))
    assert lo <= rows["one", "three"]["AUC"] <= hi
    best = fit_grid(lake["one"], "mlp_out", layers=[1], positions=["exact_answer_last"], shuffles=0)
    same = by_pair(transfer([lake["one"], lake["two"]], "mlp_out", choose="target"))["one", "one"]
    valid = lake["one"].dataset().exact_answer_valid.values.sum()
    assert same["n wrong"] + same["n correct"] == valid == int(best.n.item())
    assert same["AUC"] == round(float(best.auc.item()), 3)
    assert any("optimistic" in note for note in table.notes) and any("turned" in note for note in table.notes)


def test_the_picture(table, tmp_path):
    assert draw_transfer(table, tmp_path / "pictures" / "t.png").read_bytes().startswith(b"\x89PNG")


def test_other_models_and_too_few_captures_are_refused(lake, make_capture, store_capture, tmp_path):
    data = make_capture(n=20, positions=POSITIONS)
    other = open_capture(store_capture(data, tmp_path / "o", {"model": "m/x", "weights": "2", "task": "o"}))
    with pytest.raises(IdentityError, match="weights differ"):
        transfer([lake["one"], other], "mlp_out")
    with pytest.raises(BadInputError, match="two or more"):
        transfer([lake["one"]], "mlp_out")
    with pytest.raises(BadInputError, match="expected `train` or `target`"):
        transfer([lake["one"], lake["two"]], "mlp_out", choose="best")
