"""Grids that are interrupted, killed, or made by several processes at once are those of one uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.errors import CorruptError, ProbeError, StoreError
from hiddenlake.probing import fit
from hiddenlake.probing.cell import Cell
from hiddenlake.probing.checkpoint import Checkpoint, drop, in_progress, pack, unpack
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.grid import fit_grid, open_grid
from hiddenlake.probing.run import run_grid

ARGUMENTS = {"C": (0.01, 1.0), "cv": 3, "controls": ["token"]}

# What another process does: fit the grid of the same capture, and say how many cells it has fitted itself.
WORK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import synthetic_capture
from hiddenlake.probing import fit
from hiddenlake.probing.run import run_grid
fitted = []
fit_cell = fit.fit_cell
fit.fit_cell = lambda *arguments: (fitted.append(1), fit_cell(*arguments))[1]
data = synthetic_capture(n=int(sys.argv[3]), hidden=64)
print("ready", flush=True)
sys.stdin.readline()
run_grid(data, "mlp_out", sys.argv[2], progress=lambda done, total: print(done, flush=True), **json.loads(sys.argv[4]))
print(json.dumps({"fitted": len(fitted)}))
"""


def start(out: Path, n: int = 240, **arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(Path(__file__).parent), str(out), str(n), json.dumps(ARGUMENTS | arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip


def go(*processes: subprocess.Popen) -> None:
    """Let them begin, once all are there: on a busy machine one would have ended before the other has imported."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.fixture(scope="module")
def data(make_capture):
    return make_capture(n=240, hidden=64)


@pytest.fixture(scope="module")
def whole(data):
    return fit_grid(data, "mlp_out", **ARGUMENTS)


arrays = st.lists(st.floats(width=64), min_size=1, max_size=5).map(np.array)


@settings(deadline=None)
@given(reason=st.text(), auc=arrays, n=st.integers(0, 1 << 40), accuracy=arrays, converged=st.booleans())
def test_a_cell_survives_to_the_bit(reason, auc, n, accuracy, converged):
    reason = reason.rstrip("\0")  # NumPy's text has none at its end
    cell = Cell(
        n, 2, reason, auc=auc, fold_auc=auc.reshape(1, -1, 1), fold_converged=np.array([[[converged]]]),
        metrics={"accuracy": accuracy},
    )  # fmt: skip
    again = unpack(pack(cell))
    for field in fields(Cell):
        before, after = getattr(cell, field.name), getattr(again, field.name)
        pairs = [(before[k], after[k]) for k in before] if isinstance(before, dict) else [(before, after)]
        for one, two in pairs:
            assert type(one) is type(two)
            if isinstance(one, np.ndarray):
                assert one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
            else:
                assert one == two


@pytest.mark.parametrize("compat", [None, "llmsknow"])
def test_a_finished_run_is_the_grid_and_leaves_nothing_else(data, tmp_path, compat):
    arguments = {"compat": compat, "controls": ["token"]} if compat else ARGUMENTS
    grid = run_grid(data, "mlp_out", tmp_path / "g.zarr", **arguments)
    xr.testing.assert_identical(grid, fit_grid(data, "mlp_out", **arguments))
    xr.testing.assert_identical(grid, open_grid(tmp_path / "g.zarr"))
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]


@pytest.mark.parametrize("compat", [None, "llmsknow"])
def test_what_was_finished_is_not_fitted_again(data, tmp_path, compat):
    arguments = {"compat": compat, "controls": ["token"]} if compat else ARGUMENTS
    seen = []

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(data, "mlp_out", tmp_path / "g.zarr", progress=stop, **arguments)
    kept = list(tmp_path.glob(".g.zarr.cells/*/*.npz"))
    assert 7 <= len(kept) < 24 and not (tmp_path / "g.zarr").exists()
    assert not list(tmp_path.glob(".g.zarr.cells/*/*.lock"))
    times = {path: path.stat().st_mtime_ns for path in kept}

    def look(done, total):
        seen.append({path: path.stat().st_mtime_ns for path in kept})

    grid = run_grid(data, "mlp_out", tmp_path / "g.zarr", progress=look, **arguments)
    assert all(found == times for found in seen) and len(seen) == 32
    xr.testing.assert_identical(grid, fit_grid(data, "mlp_out", **arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]


@pytest.mark.parametrize(
    "other",
    [{"C": (0.01, 2.0)}, {"scale": "rms"}, {"tol": 1e-7}, {"seed": 1}, {"shuffles": 2}, {"groups": "gold"},
     {"layers": [1, 2]}, {"positions": ["-1", "last_q"]}, {"class_weight": "balanced"}, {"solver": "sklearn"},
     {"label": "exact_answer_valid"}, {"data": 1}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_request_takes_nothing(data, tmp_path, other, monkeypatch):
    folder = tmp_path / "cells"
    changed = data.copy()
    if "data" in other:
        values = data.mlp_out.values.copy()
        values[2, 0, 0, 0] += 1.0
        changed["mlp_out"] = data.mlp_out.copy(data=values)
        other = {}
    few = {"layers": [0, 2], "positions": ["last_q", "-1"]}
    fit_grid(data, "mlp_out", checkpoint=folder, **ARGUMENTS | few)
    before = {path for path in folder.glob("*/*.npz") if not path.parent.name == "members"}
    fitted = []
    fit_cell = fit.fit_cell
    monkeypatch.setattr(fit, "fit_cell", lambda *arguments: (fitted.append(1), fit_cell(*arguments))[1])
    found = fit_grid(changed, "mlp_out", checkpoint=folder, **ARGUMENTS | few | other)
    of_site = found.sizes["layer"] * found.sizes["position"]
    # The control on `embed` has neither shuffles nor layers, nor is it of the changed site.
    assert len(fitted) in (of_site, of_site + found.sizes["position"])
    assert before < set(folder.glob("*/*.npz"))
    xr.testing.assert_identical(found, fit_grid(changed, "mlp_out", **ARGUMENTS | few | other))
    fitted.clear()
    fit_grid(data, "mlp_out", checkpoint=folder, **ARGUMENTS | few)
    assert not fitted


def test_a_damaged_cell_is_named(data, tmp_path):
    folder = tmp_path / "cells"
    one = {"layers": [0], "positions": ["-1"]}
    fit_grid(data, "mlp_out", checkpoint=folder, **ARGUMENTS | one)
    path = next(folder.glob("*/0.0.npz"))
    raw = bytearray(path.read_bytes())
    for damage in (raw[:-1], raw[:0], raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], raw[: len(raw) // 2]):
        for cell in folder.glob("*/0.0.npz"):
            cell.write_bytes(damage)
        with pytest.raises(CorruptError, match=r"0\.0\.npz: not a finished cell"):
            fit_grid(data, "mlp_out", checkpoint=folder, **ARGUMENTS | one)


def test_a_cell_in_other_hands_is_waited_for(data, tmp_path):
    """A claim that is given up without a result is taken over; meanwhile everything else is done."""
    array, y = data.mlp_out.isel(layer=[0], position=[7]), ~data.correct.values
    fit_probes(array, y, checkpoint=tmp_path / "cells")
    (path,) = (tmp_path / "cells").glob("*/*.npz")
    path.unlink()
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.folder = path.parent
    claim = checkpoint.claim((0, 0))
    assert checkpoint.claim((0, 0)) is None
    results = []
    other = threading.Thread(target=lambda: results.append(fit_probes(array, y, checkpoint=tmp_path / "cells")))
    other.start()
    other.join(1.0)
    assert other.is_alive() and not results
    drop(claim)
    other.join(60)
    assert not other.is_alive() and path.exists()
    xr.testing.assert_identical(results[0], fit_probes(array, y))


def test_a_failure_before_any_cell_leaves_nothing(data, tmp_path):
    with pytest.raises(ProbeError):
        run_grid(data, "mlp_out", tmp_path / "g.zarr", cv=1000)
    assert not list(tmp_path.iterdir())
    (tmp_path / "papers").mkdir()
    with pytest.raises(StoreError, match="is no Zarr group"):
        run_grid(data, "mlp_out", tmp_path / "papers")
    with in_progress(tmp_path / "h.zarr") as folder, in_progress(tmp_path / "h.zarr") as same:
        assert folder == same and len(list((folder / "members").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["papers"]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(whole, tmp_path):
    out, chance = tmp_path / "g.zarr", random.Random(0)
    for _ in range(3):
        process = start(out)
        go(process)
        for _ in range(chance.randint(1, 9)):
            assert process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(out)
    go(process)
    told, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert json.loads(told.splitlines()[-1])["fitted"] < 32, "what was finished was fitted again"
    xr.testing.assert_identical(open_grid(out), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]


@pytest.mark.slow
def test_processes_share_the_cells_of_a_grid(whole, tmp_path):
    out = tmp_path / "g.zarr"
    processes = [start(out) for _ in range(2)]
    go(*processes)
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    fitted = [json.loads(lines.splitlines()[-1])["fitted"] for lines, _ in told]
    assert sum(fitted) == 32 and min(fitted) > 0, fitted
    xr.testing.assert_identical(open_grid(out), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]
