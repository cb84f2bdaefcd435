"""Rows: ratios are taken round by round, and a goal is judged by the interval's worse end."""

import json

import numpy as np
import pytest
from _table import compare, print_table, spread, write_json


def test_ratios_are_of_the_same_round():
    # rounds differ tenfold, the ratio does not
    rival = [1.0, 10.0, 2.0, 7.0]
    assert spread([1.1 * value for value in rival], rival) == pytest.approx((1.1, 1.1, 1.1))


def test_the_interval_covers_the_true_centre():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = spread(np.exp(random.normal(0, 0.05, 11)), np.ones(11))
        hits += low <= 1 <= high
    assert 160 <= hits <= 198  # 90 % of 200, within chance and the bootstrap's own error


@pytest.mark.parametrize(("goal", "met"), [(1.2, True), (1.06, False)])
def test_a_goal_is_met_by_the_whole_interval(goal, met):
    ours = [1.0, 1.02, 1.04, 1.1, 1.15]
    row = compare("case", "CPU s", ours, [1.0] * 5, "rival", goal=goal)
    assert 1.04 < row.ratio < 1.07 < row.ratio_high
    assert row.met is met
    assert compare("case", "MB/s", ours, [1.0] * 5, "rival", goal=1.0, less_is_better=False).met is True


def test_two_rounds_are_not_judged():
    row = compare("case", "CPU s", [1.0, 1.0], [1.0, 1.0], "rival", goal=1.06)
    assert (row.ratio, row.ratio_low, row.ratio_high, row.met) == (1.0, None, None, None)


def test_the_table_and_its_json(tmp_path, capsys):
    row = compare("case", "CPU s", [5.0] * 3, [100.0] * 3, "rival", goal=1 / 18, means="what it means")
    print_table([row])
    printed = capsys.readouterr().out
    assert "| case | CPU s | 5 | 100 rival | 1/20.0 (1/20.0 to 1/20.0) |  | 1/18.0: met |  |" in printed
    assert printed.rstrip().endswith("- case / rival: what it means.")
    write_json(tmp_path / "rows.json", [row], {"cpu": "x"})
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"] == {"cpu": "x"} and written["rows"][0]["ratio"] == pytest.approx(0.05)


def test_a_disturbed_round_moves_the_centre_little():
    quiet = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01]
    assert spread([*quiet, 1.7], np.ones(8))[0] == pytest.approx(spread(quiet, np.ones(7))[0], abs=0.01)
