"""Devices: named ones that are not there are refused, and a GPU's memory bounds what is worked on at once."""

import numpy as np
import pytest
import torch
import xarray as xr

from hiddenlake.cache.errors import ProbeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.plan import make_plan
from hiddenlake.probing.solvers.memory import projected
from hiddenlake.probing.solvers.place import check_device, device_memory, queue_of_thread

GiB = 1 << 30


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpu", "is no device: expected e.g. cpu, cuda or cuda:1"),
        ("meta", "cpu or cuda, not on 'meta'"),
        ("cuda:99", r"torch sees \d+ CUDA devices here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, sentence):
    y = np.arange(40) % 2 == 0
    A = xr.DataArray(np.random.default_rng(0).standard_normal((40, 3)), dims=("sample", "hidden"))
    with pytest.raises(ProbeError, match=sentence):
        fit_probes(A, y, device=name)


def test_a_cpu_has_no_queue_and_no_memory_of_its_own():
    cpu = check_device("cpu")
    with queue_of_thread(cpu):
        assert device_memory(cpu) is None


def test_the_memory_of_a_gpu_bounds_cells_and_columns():
    n, d, how = 2000, 4096, {"columns": 1000, "n_folds": 5, "n_masks": 15, "memory": 1000 * GiB}
    cell = n * d * 2

    def on_device(columns):
        return cell + projected(n, d, 2, columns, 5, 15, "cuda")

    assert make_plan(n, d, 2, **how) == make_plan(n, d, 2, **how, device_memory=1000 * GiB)
    one = make_plan(n, d, 2, **how, device_memory=on_device(1000))
    assert (one.threads, one.columns) == (1, None)
    fewer = make_plan(n, d, 2, **how, device_memory=on_device(1000) - 1)
    assert fewer.threads == 1 and fewer.columns == 500
    with pytest.raises(ProbeError, match=r"and the GPU has 1\.\d+ GiB: give more"):
        make_plan(n, d, 2, **how, device_memory=on_device(1) - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["newton", "sklearn"])
def test_a_gpu_finds_the_same_probes(solver):
    rng = np.random.default_rng(0)
    A = xr.DataArray(rng.standard_normal((3, 2, 300, 40)), dims=("layer", "position", "sample", "hidden"))
    y = A.values[1, 1, :, 0] + rng.standard_normal(300) > 0
    how = {"C": (0.01, 1.0), "shuffles": 5, "nested": True, "solver": solver}
    for dtype in (np.float32, np.float16):
        ours, theirs = (fit_probes(A.astype(dtype), y, **how, device=device) for device in ("cpu", "cuda"))
        assert bool(theirs.converged.all())
        np.testing.assert_allclose(theirs.objective, ours.objective, rtol=2e-6)
        bounds = ours.auc_certified_lo.values - 1e-9, ours.auc_certified_hi.values + 1e-9
        assert ((theirs.auc_certified_hi >= bounds[0]) & (theirs.auc_certified_lo <= bounds[1])).all()
    assert torch.cuda.memory_allocated() < 1 << 20
