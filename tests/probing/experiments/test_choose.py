"""One of several answers is picked, and the probe that picks has not seen the question."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hiddenlake.probing.experiments import choose as module
from hiddenlake.probing.experiments.choices import at_random, by_majority, by_score, mean_intervals
from hiddenlake.probing.experiments.choose import choose, layers_of
from hiddenlake.probing.experiments.resamples import read_resamples
from hiddenlake.probing.experiments.taxonomy import Tally
from hiddenlake.probing.train import fit_probe

from .conftest import QUESTIONS, K

BOOLS = arrays(bool, (6, 5))


@given(BOOLS, BOOLS, arrays(float, (6, 5), elements=st.floats(-5, 5)))
def test_choices_pick_one_of_the_answers(correct, valid, score):
    for picked in (at_random(correct, valid), by_score(correct, valid, score)):
        assert ((picked >= 0) & (picked <= 1)).all()
        assert (picked[correct.all(axis=1) & valid.any(axis=1)] == 1).all() and (
            picked[~correct.any(axis=1)] == 0
        ).all()
    order = np.argsort(score, axis=1, kind="stable")
    best = by_score(correct, valid, np.where(correct, 10.0, score))
    assert (best == (correct & valid).any(axis=1) | (~valid.any(axis=1) & correct[:, 0])).all()
    assert order.shape == score.shape


def test_choices_by_hand():
    correct, valid = (
        np.array([[True, False, False]] * 3),
        np.array([[True, True, False], [False, True, True], [False] * 3]),
    )
    assert at_random(correct, valid).tolist() == [0.5, 0.0, 0.0]
    score = np.array([[0.1, 0.2, 9.0], [9.0, 0.1, 0.2], [0.0, 1.0, 2.0]])
    assert by_score(correct, valid, score).tolist() == [0.0, 0.0, 1.0]  # of none valid, the first
    assert by_score(correct, valid, np.where(correct, np.nan, score)).tolist() == [0.0, 0.0, 1.0]
    assert by_majority([Tally(3, 2, (1,), 0), Tally(4, 2, (2,), 0), Tally(3, 1, (), 2), Tally(1, 1, (), 0)]).tolist() == [
        1.0, 0.0, 0.0, 1.0
    ]  # fmt: skip


def test_intervals_of_means_grow_when_groups_repeat():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random((50, 1)) < 0.5, 4, axis=0).astype(float)
    lo, hi = mean_intervals(values, np.arange(200), 0)
    grouped_lo, grouped_hi = mean_intervals(values, np.repeat(np.arange(50), 4), 0)
    mean = values.mean()
    assert grouped_lo < lo < mean < hi < grouped_hi
    assert hi - lo == pytest.approx(2 * 1.96 * np.sqrt(mean * (1 - mean) / 200), rel=0.15)
    assert grouped_hi - grouped_lo == pytest.approx(2 * (hi - lo), rel=0.2)
    same_lo, same_hi = mean_intervals(np.ones((10, 2)), np.arange(10), 0)
    assert same_lo.tolist() == same_hi.tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def table(greedy, drawn):
    layers = layers_of(greedy, "mlp_out", "exact_answer_last")
    assert layers == (1,) * 5
    return choose(greedy, drawn, K, "mlp_out", "exact_answer_last", layers)


def test_a_probe_picks_right_answers(table, greedy, drawn):
    found = read_resamples(drawn, K)
    rows = {row["choice"]: row for row in table.rows if row["questions"] == "all"}
    assert rows["greedy"]["accuracy"] == round(float(greedy.correct.mean()), 3) and rows["greedy"]["n"] == QUESTIONS
    assert rows["any is right"]["accuracy"] == round(float(found.correct.any(axis=1).mean()), 3)
    assert rows["any is right"]["accuracy"] >= rows["probe"]["accuracy"] > rows["random"]["accuracy"] + 0.15
    above = rows["probe"]
    assert above["above greedy"] == pytest.approx(above["accuracy"] - rows["greedy"]["accuracy"], abs=2e-3)
    lo, hi = map(float, above["95 %"].split(" to "))
    assert lo < above["accuracy"] < hi
    assert all(row["n"] >= 30 for row in table.rows)


def test_no_question_is_on_both_sides(greedy, drawn, monkeypatch):
    trained = []
    real = fit_probe

    def spy(data, *arguments, **settings):
        trained.append(set(data["index"].values.tolist()))
        return real(data, *arguments, **settings)

    scored = []
    monkeypatch.setattr(module, "fit_probe", spy)
    monkeypatch.setattr(
        module, "score_rows", lambda probe, capture, rows: scored.append(set(rows // K)) or np.zeros(len(rows))
    )
    pairs = greedy.assign(group=("sample", np.array([f"pair {i // 2}" for i in range(QUESTIONS)], object)))
    choose(pairs, drawn, K, "mlp_out", "exact_answer_last", (1,) * 5)
    assert len(trained) == len(scored) == 5 and set.union(*scored) == set(range(QUESTIONS))
    for seen, asked in zip(trained, scored, strict=True):
        assert not seen & asked and not {i // 2 for i in seen} & {i // 2 for i in asked}


def test_the_papers_selection_is_said(greedy, drawn):
    table = choose(greedy, drawn, K, "mlp_out", "exact_answer_last", (1,) * 5, compat="llmsknow")
    valid = int(greedy.exact_answer_valid.sum())
    assert table.facts["questions"] == valid and table.rows[0]["n"] == valid
    assert table.facts["lacking"]["an exact answer of the greedy one"] == QUESTIONS - valid
