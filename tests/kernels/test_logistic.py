"""The logistic kernel against its reference, and that against automatic derivatives and scikit-learn's loss."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from hiddenlake.kernels.logistic import Losses, logistic_losses, logistic_losses_reference, logistic_losses_triton


@dataclass(frozen=True)
class Case:
    """B problems (None: no such axis) of n rows and k columns."""

    B: int | None
    n: int
    k: int

    def __str__(self) -> str:
        return f"B{self.B}-n{self.n}-k{self.k}"


CASES = (Case(None, 1, 1), Case(None, 200, 33), Case(3, 65, 7), Case(2, 128, 32), Case(1, 1000, 3), Case(2, 0, 4))
DTYPES = (torch.float32, torch.float64)


def arguments(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores of all sizes, rows of which some do not count."""
    g = torch.Generator().manual_seed(seed)
    batch = () if case.B is None else (case.B,)
    scores = torch.randn(*batch, case.n, case.k, generator=g, dtype=dtype)
    scores *= 10 ** (torch.rand(scores.shape, generator=g, dtype=dtype) * 6 - 4)
    rows = torch.rand(*batch, case.n, generator=g, dtype=dtype) * (torch.rand(*batch, case.n, generator=g) < 0.8)
    return tuple(
        tensor.to(device)
        for tensor in (
            scores,
            torch.randn(*batch, case.k, generator=g, dtype=dtype),
            torch.where(torch.rand(*batch, case.n, case.k, generator=g) < 0.4, 1.0, -1.0).to(dtype),
            rows,
            torch.rand(*batch, 2, case.k, generator=g, dtype=dtype) * 3,
        )
    )


def assert_close(found: Losses, expected: Losses) -> None:
    for name, a, b in zip(Losses._fields, found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        precision = 2e-5 if a.dtype == torch.float32 else 1e-12
        # of a sum, and of p (1 - p), whose second factor is a difference, beside the largest
        wrong = (a - b).abs() > precision * (b.abs() + (b.abs().max() if name != "residual" and b.numel() else 1e-30))
        assert not wrong.any(), (
            f"{name}{wrong.nonzero()[0].tolist()}: {a[wrong][0].item()}, expected {b[wrong][0].item()}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_gives_what_the_reference_gives(device, case, dtype):
    given = arguments(case, dtype, device)
    assert_close(logistic_losses_triton(*given), logistic_losses_reference(*given))


def test_the_kernel_reads_what_is_not_contiguous(device):
    scores, intercept, positive, rows, columns = arguments(Case(2, 70, 9), torch.float32, device)
    expected = logistic_losses_reference(scores, intercept, positive, rows, columns)
    strided = positive.mT.contiguous().mT
    assert_close(logistic_losses_triton(scores, intercept, strided, rows, columns.mT.contiguous().mT), expected)


def test_the_reference_is_the_loss_and_its_derivatives():
    scores, intercept, positive, rows, columns = arguments(Case(None, 40, 5), torch.float64, torch.device("cpu"))
    found = logistic_losses(scores, intercept, positive, rows, columns)
    weight = rows[:, None] * torch.where(positive > 0, columns[1], columns[0])
    for j in range(5):
        p = torch.sigmoid(scores[:, j] + intercept[j]).numpy()
        inside = weight[:, j].numpy() > 0
        p = np.stack([1 - p, p], 1)[inside]
        if p.min() > 1e-12:  # log_loss clips
            total = log_loss(
                positive[:, j].numpy()[inside] > 0, p, sample_weight=weight[:, j].numpy()[inside], normalize=False,
                labels=[False, True],
            )  # fmt: skip
            assert found.loss[j].item() == pytest.approx(total, rel=1e-9)

    def loss(z):
        y = torch.where(positive > 0, 1.0, -1.0).double()
        return (weight * torch.nn.functional.softplus(-y * (z + intercept), threshold=1e9)).sum()

    z = scores.clamp(-30, 30).requires_grad_()
    found = logistic_losses(z.detach(), intercept, positive, rows, columns)
    [first] = torch.autograd.grad(loss(z), z, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), z)
    assert torch.allclose(found.residual, first.detach(), rtol=1e-9, atol=1e-14)
    assert torch.allclose(found.curvature, second, rtol=1e-6, atol=1e-14)
    assert torch.allclose(found.slope, first.sum(0).detach())
    assert torch.allclose(found.curve, second.sum(0), rtol=1e-6)
    assert found.loss.sum().item() == pytest.approx(loss(z).item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_overflows(device, dtype):
    scores = torch.tensor([[1e4, -1e4, 0.0, 40.0]], dtype=dtype, device=device)
    zeros = torch.zeros(4, dtype=dtype, device=device)
    ones = torch.ones(2, 4, dtype=dtype, device=device)
    for way in (logistic_losses_triton, logistic_losses_reference):
        for positive in (True, False):
            labels = torch.full((1, 4), 1.0 if positive else -1.0, dtype=dtype, device=device)
            found = way(scores, zeros, labels, torch.ones(1, dtype=dtype, device=device), ones)
            assert all(part.isfinite().all() for part in found)
            large = found.loss[1 if positive else 0].item()
            assert large == pytest.approx(1e4) and found.loss[2].item() == pytest.approx(np.log(2))
            small = found.loss[3].item() if positive else 0.0
            assert small == pytest.approx(np.exp(-40.0) if positive else 0.0, rel=1e-5)


def test_what_does_not_fit_is_refused():
    scores, intercept, positive, rows, columns = arguments(Case(2, 6, 4), torch.float32, torch.device("cpu"))
    for given in (
        (scores.half(), intercept, positive, rows, columns),
        (scores.mT, intercept, positive, rows, columns),
        (scores, intercept[:, :3], positive, rows, columns),
        (scores, intercept, positive > 0, rows, columns),
        (scores, intercept, positive, rows.double(), columns),
        (scores, intercept, positive, rows, columns[:, 0]),
        (scores[0, 0], intercept, positive, rows, columns),
    ):
        with pytest.raises(ValueError, match="logistic_losses"):
            logistic_losses(*given)
