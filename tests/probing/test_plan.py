"""Plans keep to the memory that is given, and what is projected is what is taken at most."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.plan import make_plan, n_threads
from hiddenlake.probing.solvers.memory import projected


@given(
    n=st.integers(1, 100_000),
    d=st.integers(1, 8192),
    columns=st.integers(1, 300),
    memory=st.integers(1 << 20, 1 << 42),
    processes=st.integers(1, 8),
)
def test_a_plan_keeps_to_the_memory(n, d, columns, memory, processes):
    one = n * d * 2 + projected(n, d, 2, 1, 5, 15)
    how = {"columns": columns, "n_folds": 5, "n_masks": 15, "processes": processes}
    if one > memory:
        with pytest.raises(ProbeError, match="the memory is too small"):
            make_plan(n, d, 2, memory=memory, **how)
        return
    plan = make_plan(n, d, 2, memory=memory, **how)
    cell, at_once = n * d * 2, plan.columns or columns
    held = plan.threads + min(plan.threads, processes) * plan.ahead
    taken = held * cell + plan.threads * projected(n, d, 2, at_once, 5, 15)
    assert taken == plan.memory_bytes <= memory and 1 <= plan.threads <= n_threads() and at_once <= columns


def test_columns_in_batches_are_the_same_probes():
    rng = np.random.default_rng(0)
    y = rng.random(3000) < 0.4
    A = xr.DataArray(rng.standard_normal((3000, 6)).astype(np.float32) + y[:, None] * 0.3, dims=("sample", "hidden"))
    plans = []
    how = {"C": (0.01, 0.1, 1.0), "cv": 3, "shuffles": 9, "nested": True, "tol": 1e-9}
    whole = fit_probes(A, y, **how)
    few = 3000 * 6 * 4 + projected(3000, 6, 4, 5, 3, 6)
    parts = fit_probes(A, y, **how, memory=few, planned=plans.append)
    assert plans[0].columns in range(1, 6) and plans[0].memory_bytes <= few
    for name in ("fold_auc", "fold_objective", "inner_auc", "auc_lo"):
        np.testing.assert_allclose(whole[name], parts[name], rtol=2e-4)
    assert whole.converged.all() and parts.converged.all()
    with pytest.raises(ProbeError, match="one cell of 3000 samples x 6 takes .* GiB were given"):
        fit_probes(A, y, **how, memory=1 << 20)


# Says how many bytes a cell took, beside its rows, at most.
PEAK = """
import ctypes, sys
import numpy as np, torch
from hiddenlake.probing.cell import fit_cell
from hiddenlake.probing.design import make_design
torch.set_num_threads(1)

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def cell(n, d, sets, tol):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d), dtype=np.float32)
    X *= np.exp(2 * rng.standard_normal(d)).astype(np.float32)
    y = X[:, 0] + rng.standard_normal(n) > 0
    every = np.arange(n)
    design = make_design(
        y, kept=np.ones(n, bool), names=every, groups=every, C=(1.0,), cv=5, scale="feature", solver="auto", tol=tol,
        shuffles=sets - 1, seed=0,
    )
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    fit_cell(X, every, design)
    return status("VmHWM") - before

cell(300, 50, 2, 1e-6)  # what is loaded at first use
print(cell(*(float(x) if "e" in x else int(x) for x in sys.argv[1:])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "sets", "tol"),
    [(2500, 1200, 2, 1e-6), (1500, 800, 12, 1e-15), (600, 2000, 12, 1e-15), (2000, 40, 80, 1e-6)],
)
def test_what_is_projected_is_what_is_taken_at_most(n, d, sets, tol):
    told = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, (n, d, sets, tol))], check=True, capture_output=True, text=True
    )
    found = int(told.stdout)
    assert found <= projected(n, d, 4, sets, 5, 5) <= 8 * found
