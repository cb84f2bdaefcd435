"""Types of error, and probes that tell them."""

import numpy as np
import pytest

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.experiments.error_types import error_types, together, typed
from hiddenlake.probing.experiments.resamples import Resamples, read_resamples
from hiddenlake.probing.experiments.taxonomy import TYPES, UNIONS, types_of

from .conftest import QUESTIONS, K


def test_answers_are_read_by_question(drawn, drawn_data):
    found = read_resamples(drawn, K)
    assert found.index.tolist() == list(range(QUESTIONS)) and found.left_out == 0
    np.testing.assert_array_equal(found.correct.ravel(), drawn_data.correct.values)
    named = [name if isinstance(name, str) else None for name in drawn_data.exact_answer.values]  # xarray has NaN
    assert [name for names in found.exact for name in names] == named
    keys = np.array(drawn.keys)[found.row]
    np.testing.assert_array_equal(keys.ravel(), drawn_data.sample.values)
    fewer = read_resamples(drawn, 2)
    np.testing.assert_array_equal(fewer.correct, found.correct[:, :2])
    some = found.of([7, 3])
    assert some.index.tolist() == [7, 3] and some.exact == (found.exact[7], found.exact[3])
    with pytest.raises(ProbeError, match="no question has 5 judged answers"):
        read_resamples(drawn, 5)


def test_every_question_is_labelled_by_its_own_answers(drawn, drawn_data):
    labels = typed(read_resamples(drawn, K))
    assert set(labels) == {*TYPES, *UNIONS}
    for q in (0, 1, QUESTIONS - 1):
        own = slice(q * K, (q + 1) * K)
        [counted] = Resamples(
            np.array([q]), drawn_data.correct.values[None, own], (tuple(drawn_data.exact_answer.values[own]),), None, 0
        ).tallies()
        assert {name for name in TYPES if labels[name][q]} == types_of(counted)
        assert labels["B"][q] == (labels["B1"][q] or labels["B2"][q])


@pytest.fixture(scope="module")
def known(greedy, drawn):
    """A greedy capture whose activations at (0, last_q) hold the type C2, and at (1, exact_answer_last) correctness."""
    labels = typed(read_resamples(drawn, K))
    data = greedy.copy(deep=True)
    at = data.position.values.tolist().index("last_q")
    data.mlp_out.values[0, at, :, 3] += 4 * labels["C2"]
    return data


def test_a_type_is_found_where_it_is(known, drawn):
    found = read_resamples(drawn, K)
    rows = {row["type"]: row for row in error_types(known, found, "mlp_out", cell=(0, "last_q")).rows}
    label = typed(found)["C2"]
    assert rows["C2"]["AUC"] > 0.9 and rows["C2"]["n type"] == label.sum() == rows["C2"]["questions"]
    assert rows["C2"]["n others"] == (~label).sum() and rows["C2"]["share"] == round(label.mean(), 3)
    lo, hi = map(float, rows["C2"]["certified"].split(" to "))
    assert lo <= rows["C2"]["AUC"] + 5e-4 and hi >= rows["C2"]["AUC"] - 5e-4 and hi - lo < 0.01


def test_the_cell_is_that_of_correctness_by_default(known, drawn):
    table = error_types(known, read_resamples(drawn, K), "mlp_out")
    assert table.facts["cells"] == ["1 exact_answer_last"]
    rare = [row for row in table.rows if row["questions"] < 10]
    assert rare and all("too few" in row["why not"] or "one class" in row["why not"] for row in rare)
    assert any("fall together" in note for note in table.notes)
    compat = error_types(known, read_resamples(drawn, K), "mlp_out", cell=(0, "last_q"), compat="llmsknow")
    assert any("compat" in note for note in compat.notes)


def test_questions_without_all_answers_are_left_out_and_said(greedy, drawn):
    found = read_resamples(drawn, K)
    fewer = found.of(np.arange(10, QUESTIONS))
    data, answers, lacking = together(greedy.isel(sample=slice(0, 150)), fewer)
    assert data["index"].values.tolist() == answers.index.tolist() == list(range(10, 150))
    assert lacking == {"all of the other answers": 10, "a judged greedy answer": 10}
    turned = greedy.isel(sample=np.arange(QUESTIONS)[::-1])
    data, answers, _ = together(turned, found)
    np.testing.assert_array_equal(answers.correct, found.correct[::-1])
    assert data["index"].values.tolist() == answers.index.tolist()
    with pytest.raises(ProbeError, match="several answers to one question"):
        together(greedy.assign(index=("sample", np.zeros(QUESTIONS, int))), found)
    with pytest.raises(ProbeError, match="same task"):
        together(greedy.assign(index=("sample", np.arange(QUESTIONS) + 1000)), found)
