"""solver="cuml" where there is neither cuML nor a GPU: what it says, what it imports, and what it asks QN for."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from scipy.optimize import minimize

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.probing.fit import fit_probes
from hiddenlake.probing.solvers import cuml
from hiddenlake.probing.solvers.newton import solve_newton
from hiddenlake.probing.solvers.penalised import solve_penalised
from hiddenlake.probing.solvers.problem import make_problem


def rows(n=90, d=6):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d)) + 3.0
    return X, X[:, 0] - 3.0 + rng.standard_normal(n) > 0


def problem(l1_ratio=0.0):
    X, y = rows()
    rng = np.random.default_rng(1)
    train = (np.arange(90) % 3 != np.arange(2)[:, None]) * (rng.random(90) + 0.2)
    labels = np.stack([y, rng.permutation(y)])
    C, fold, sets = (axis.ravel() for axis in np.meshgrid([1.0, 0.05], [0, 1], [0, 1], indexing="ij"))
    return make_problem(
        X, labels, train, C=C, fold=fold, label_set=sets, l1_ratio=l1_ratio,
        class_weight=np.tile([0.5, 2.0], (len(C), 1)),
    )  # fmt: skip


class QN:
    """Stands where cuML's QN would: minimises what its documentation says that one does, on the host, and notes its calls.

    Weights divide the losses by their sum (`by_weight`) or by the number of rows.
    """

    made: list = []
    by_weight = True

    def __init__(self, **options):
        self.options, self.fits, self.start = options, [], None
        self.l1_strength = self.l2_strength = 0.0
        QN.made.append(self)

    def fit(self, X, y, sample_weight):
        assert X.dtype == y.dtype == sample_weight.dtype == np.float32 and set(np.unique(y)) == {0.0, 1.0}
        X, sign, weight = X.astype(float), np.where(y > 0, 1.0, -1.0), sample_weight.astype(float)
        whole, (l1, l2) = weight.sum() if self.by_weight else len(y), (self.l1_strength, self.l2_strength)
        d = X.shape[1]

        def value(split):  # w = up - down, both at least 0, so that the l1 part is smooth
            w, b = split[:d] - split[d : 2 * d], split[-1]
            margin = sign * (X @ w + b)
            pull = -(weight * sign / (1 + np.exp(margin))) / whole
            g = X.T @ pull + l2 * w
            loss = (weight * np.logaddexp(0, -margin)).sum() / whole + l1 * split[: 2 * d].sum() + 0.5 * l2 * w @ w
            return loss, np.concatenate([g + l1, l1 - g, [pull.sum()]])

        bounds = [(0, None)] * (2 * d) + [(None, None)]
        found = minimize(
            value, np.zeros(2 * d + 1), jac=True, bounds=bounds, method="L-BFGS-B",
            options={"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-12},
        )  # fmt: skip
        self.coef_, self.intercept_ = (found.x[:d] - found.x[d : 2 * d])[None].astype(np.float32), found.x[-1:]
        self.num_iters = found.nit
        self.fits.append((self.l1_strength, self.l2_strength))


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("by_weight", [True, False], ids=["weights summed", "rows counted"])
def test_what_qn_is_asked_for_is_the_problem(monkeypatch, l1_ratio, by_weight):
    monkeypatch.setattr(QN, "made", [])
    monkeypatch.setattr(QN, "by_weight", by_weight)
    monkeypatch.setattr(cuml, "_load", lambda: (QN, lambda tensor: tensor.numpy()))
    at = problem(l1_ratio)
    found = cuml.solve_cuml(at, 1e-5)
    ours = (solve_penalised if l1_ratio else solve_newton)(at, 1e-9)
    assert found.converged.all() and (found.n_iter > 0).all()
    np.testing.assert_allclose(found.objective, ours.objective, rtol=1e-5)
    np.testing.assert_allclose(found.coef, ours.coef, atol=2e-2)
    assert len(QN.made) == 4  # a fold and a label set each, its C in one warm-started chain, the weakest first
    for model in QN.made:
        assert model.options["delta"] == 0.0 and model.options["warm_start"] and not model.options["penalty_normalized"]
        (l1_weak, l2_weak), (l1_strong, l2_strong) = model.fits
        assert l1_weak + l2_weak > l1_strong + l2_strong
        assert (l1_weak == 0) == (l1_ratio == 0) and (l2_weak == 0) == (l1_ratio == 1)


def test_what_does_not_reach_the_certificate_is_tried_again_and_told(monkeypatch):
    monkeypatch.setattr(QN, "made", [])
    monkeypatch.setattr(cuml, "_load", lambda: (QN, lambda tensor: tensor.numpy()))
    found = cuml.solve_cuml(problem(), 1e-18)
    assert not found.converged.any() and (found.gap_bound > 1e-18 * found.objective).all()
    assert [model.options["tol"] for model in QN.made] == [1e-6] * 4 + [1e-8] * 4


def cells():
    X, y = rows()
    return xr.DataArray(X.astype(np.float32), dims=("sample", "hidden")), y


def test_without_cuml_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuml", None)
    with pytest.raises(HiddenlakeError, match=r"needs cuML and CuPy .*pip install 'hiddenlake\[cuml\]'"):
        fit_probes(*cells(), solver="cuml")


def test_without_a_gpu_the_error_says_so(monkeypatch):
    from types import ModuleType

    names = ("cupy", "cuml", "cuml.solvers")
    modules = {name: ModuleType(name) for name in names}
    modules["cuml.solvers"].QN = QN
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cuml.torch.cuda, "is_available", lambda: False)
    with pytest.raises(HiddenlakeError, match="needs a CUDA GPU that torch and CuPy can use"):
        fit_probes(*cells(), solver="cuml")


def test_nothing_imports_cuml_before_it_is_asked_for():
    script = (
        "import sys, hiddenlake; hiddenlake.fit_probes, hiddenlake.fit_grid; import hiddenlake.probing.solvers.cuml; "
        "print(sorted({'cuml', 'cupy', 'cudf', 'rmm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
