"""Detectors of errors beside each other."""

import json

import numpy as np
import pytest

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.experiments.detect import comparable, detect
from hiddenlake.probing.grid import fit_grid

POSITIONS = ("last_q", "exact_answer_last", "-1")


@pytest.fixture
def data(make_capture):
    """Where the model is less sure of the exact answer when it is wrong."""
    data = make_capture(n=300)
    rng = np.random.default_rng(1)
    logprobs = np.empty(300, object)
    lengths = (data.total_length - data.prompt_length).values
    logprobs[:] = [-rng.random(int(n)) for n in lengths]
    first = data.token_index.sel(position="exact_answer_first").values - data.prompt_length.values
    for i in range(300):
        if first[i] >= 0:
            logprobs[i][first[i]] -= 0.0 if data.correct.values[i] else rng.random() * 2
    return data.assign(logprobs=("sample", logprobs))


def by_name(table):
    return {(row["method"], row["tokens"]): row for row in table.rows}


def test_every_row_is_of_the_same_samples(data, tmp_path):
    table = detect(data, "mlp_out", positions=POSITIONS)
    usable, lacking = comparable(data, POSITIONS)
    valid, wrong = data.exact_answer_valid.values, ~data.correct.values
    assert (usable <= valid).all() and lacking["an exact answer"] == int((~valid).sum())
    assert sum(lacking.values()) == int((~usable).sum())
    assert {(row["n wrong"], row["n correct"]) for row in table.rows} == {
        (int((usable & wrong).sum()), int((usable & ~wrong).sum()))
    }
    assert table.facts["compared"] == usable.sum() and table.facts["samples"] == 300
    rows = by_name(table)
    assert len(rows) == len(table.rows) == 6 + 3
    assert rows["probe", "exact_answer_last"]["layers"] == "1" and rows["probe", "exact_answer_last"]["AUC"] > 0.8
    assert rows["logprob min exact", "exact answer"]["AUC"] > rows["logprob min", "answer"]["AUC"] > 0.5
    assert rows["probe", "last_q"]["in prompt"] == usable.sum() and rows["probe", "exact_answer_last"]["in prompt"] == 0
    saved = json.loads(table.save(tmp_path / "detect.json").read_text())
    assert (
        saved["rows"] == table.rows and saved["max_relative_gap"] <= 1e-6 and "raw scores" in " ".join(saved["notes"])
    )


def test_one_layer_leaves_nothing_to_choose(data):
    one = data.isel(layer=[1])
    row = by_name(detect(one, "mlp_out", positions=["exact_answer_last"]))["probe", "exact_answer_last"]
    usable, _ = comparable(one, ["exact_answer_last"])
    kept = one.isel(sample=np.flatnonzero(usable))
    grid = fit_grid(kept, "mlp_out", positions=["exact_answer_last"], shuffles=0)
    assert row["AUC"] == round(float(grid.auc.item()), 3)
    assert row["95 %"] == f"{float(grid.auc_lo.item()):.3f} to {float(grid.auc_hi.item()):.3f}"


def test_p_true_is_shown_in_both_orders_and_its_gaps_leave_all_rows(data):
    wrong = ~data.correct.values
    odds = {
        ("answer", True): np.where(wrong, -1.0, 1.0),
        ("answer", False): np.zeros(300),
        ("exact answer", True): np.where(np.arange(300) < 50, np.nan, 0.0),
        ("exact answer", False): np.where(wrong, 1.0, -1.0),
    }
    table = detect(data, "mlp_out", positions=["-1"], p_true=odds)
    rows = by_name(table)
    assert rows["p(True), A is true, better", "answer"]["AUC"] == 1.0
    assert rows["p(True), B is true", "answer"]["AUC"] == 0.5
    assert rows["p(True), A is true, better", "exact answer"]["AUC"] == 0.5
    assert rows["p(True), B is true", "exact answer"]["AUC"] == 0.0
    usable, _ = comparable(data, ["-1"])
    assert table.facts["compared"] == usable[50:].sum()
    assert table.facts["lacking"]["an answer to p(True)"] == usable[:50].sum()
    assert any("optimistic" in note for note in table.notes)


def test_nothing_to_compare_is_refused(data):
    none = data.assign(exact_answer_valid=("sample", np.zeros(300, bool)))
    with pytest.raises(ProbeError, match=r"no sample of 300 can be compared: they lack .*an exact answer \(300\)"):
        detect(none, "mlp_out", positions=POSITIONS)
    with pytest.raises(UnknownNameError, match="'-9'"):
        detect(data, "mlp_out", positions=["-9"])
