"""fit_multiclass_grid: which samples are in, the planted signal, and saving."""

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.probing.grid import best_cell, open_grid, save_grid
from hiddenlake.probing.multiclass_grid import fit_multiclass_grid


@pytest.fixture(scope="module")
def capture(make_capture):
    """The planted signal tells correct from wrong; the column splits the wrong ones by a feature of another cell."""
    data = make_capture(n=300)
    cell = data.mlp_out.isel(layer=1).sel(position="exact_answer_last").values.astype(float)
    wrong = np.where(np.nan_to_num(cell[:, 0]) > np.nanmedian(cell[:, 0]), "refuses", "another")
    kind = np.where(data.correct.values, "right", wrong).astype(object)
    kind[:7], kind[7:10] = None, ""
    return data.assign(kind=("sample", kind))


@pytest.mark.parametrize("multiclass", ["softmax", "ovr"])
def test_the_planted_cell_is_the_best_and_is_kept_whole(capture, multiclass, tmp_path):
    grid = fit_multiclass_grid(capture, "mlp_out", label="kind", multiclass=multiclass, cv=3, C=0.1, positions=["exact_answer_last", "-1"])
    best = best_cell(grid)
    assert (best.layer, best.position) == (1, "exact_answer_last") and best.auc > 0.8
    assert grid["class"].values.tolist() == ["another", "refuses", "right"]
    assert grid.attrs["n"] == 290 and grid.attrs["n_unlabelled"] == 10 and grid.attrs["multiclass"] == multiclass
    assert grid.converged.where(grid.auc.notnull(), True).all()
    xr.testing.assert_equal(open_grid(save_grid(grid, tmp_path / "kind.zarr")), grid)


def test_only_some_classes(capture):
    more = capture.assign(kind=("sample", np.where(np.arange(300) % 40 == 0, "rare", capture.kind.values)))
    names = ["another", "refuses", "right"]
    grid = fit_multiclass_grid(more, "mlp_out", label="kind", classes=names, cv=3, layers=[1], positions=["-1"])
    assert grid["class"].values.tolist() == names and grid.attrs["n"] < 290


def test_what_is_not_there_is_named(capture):
    with pytest.raises(UnknownNameError, match="no column 'mood'"):
        fit_multiclass_grid(capture, "mlp_out", label="mood")
    with pytest.raises(ProbeError, match="no sample has 'kind' 'fair': the column has"):
        fit_multiclass_grid(capture, "mlp_out", label="kind", classes=["fair", "right", "another"])
    with pytest.raises(ProbeError, match="y has 2 classes: expected three or more; fit_probes tells two apart"):
        fit_multiclass_grid(capture, "mlp_out", label="correct")
