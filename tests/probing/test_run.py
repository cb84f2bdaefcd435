"""Helpers: processes that take cells of one grid change no bit of it, may die, and never outlive whom they help."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.cache.store import open_capture
from hiddenlake.probing import fit
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.run import run_grid

ARGUMENTS = {
    "cv": 3,
    "shuffles": 2,
    "controls": ("token",),
    "C": (0.01, 0.1),
    "layers": np.arange(2),
    "class_weight": {False: 1.0, True: np.float64(2.5)},
}

SLOW = """
import sys, time
from hiddenlake.probing import fit
from hiddenlake.probing.run import run_grid
fit_cell = fit.fit_cell
fit.fit_cell = lambda *arguments: (time.sleep(0.5), fit_cell(*arguments))[1]
run_grid(sys.argv[1], "mlp_out", sys.argv[2], workers=2, progress=lambda done, _: print(done, flush=True))
"""


@pytest.fixture(scope="module")
def disk(make_capture, tmp_path_factory, store_capture) -> Path:
    data = make_capture(n=200, hidden=16)
    return store_capture(data, tmp_path_factory.mktemp("lake") / "capture", {"model": "m", "task": "t", "decoding": {}})


@pytest.fixture(scope="module")
def whole(disk) -> xr.Dataset:
    return fit_grid(disk, "mlp_out", **ARGUMENTS)


@pytest.mark.slow
def test_a_helper_takes_cells_and_changes_no_bit(disk, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("hiddenlake.probing.plan.n_threads", lambda: 2)
    own, fit_cell = [], fit.fit_cell

    def slowly(*arguments):
        own.append(1)
        time.sleep(0.6)
        return fit_cell(*arguments)

    monkeypatch.setattr(fit, "fit_cell", slowly)
    seen = []
    grid = run_grid(
        disk, "mlp_out", tmp_path / "g.zarr", workers=2, progress=lambda *pair: seen.append(pair), **ARGUMENTS
    )
    xr.testing.assert_identical(grid, whole)
    cells = (whole.sizes["layer"] + 1) * whole.sizes["position"]
    assert 0 < len(own) < cells and seen[-1] == (cells, cells)
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]


def test_a_helper_that_cannot_work_is_named_and_the_grid_is_whole(disk, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("hiddenlake.probing.plan.n_threads", lambda: 2)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.warns(RuntimeWarning, match="ended with status 7: its cells were fitted without it"):
        grid = run_grid(disk, "mlp_out", tmp_path / "g.zarr", workers=2, **ARGUMENTS)
    xr.testing.assert_identical(grid, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_in_memory_have_no_helpers(disk, tmp_path, workers):
    data = open_capture(disk).dataset()
    with pytest.raises(ProbeError, match=f"workers is {workers}: expected 1 or more, and 1 for what is no stored"):
        run_grid(data, "mlp_out", tmp_path / "g.zarr", workers=workers)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no helper")
def test_helpers_end_with_whom_they_help(disk, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(disk), str(tmp_path / "g.zarr")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    [helper] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert b"hiddenlake.probing.helper" in Path(f"/proc/{helper}/cmdline").read_bytes()
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{helper}").exists() and b"helper" in Path(f"/proc/{helper}/cmdline").read_bytes():
        assert time.monotonic() < end, "the helper went on alone"
        time.sleep(0.1)
