"""A short soak: the load and the judgement of benchmarks/soak.py, which does it at length."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ..prepared import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What happens to so few generations by chance.
RARE = {"aborted: prefilling", "aborted: decoding", "aborted: preempted"}


def test_nothing_is_wrong_lost_or_left_behind(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    import soak

    # In a process of its own: what other tests' engines share with this one would be counted.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        parts = alone.submit(soak.soak, [soak.STOPS], 200, seed=0, folder=tmp_path).result()
    rows = {row.case: row for row in soak.rows_of(parts)}
    soak.print_table(list(rows.values()))
    assert {name for name, row in rows.items() if row.met is False} <= RARE
    assert rows["rows wrong"].met and parts[0].counts.aborts.total() >= 10 and parts[0].compared.rows > 1000
    assert rows["last tokens fed behind stop strings"].ours >= 50 and rows["preemptions"].ours >= 50
