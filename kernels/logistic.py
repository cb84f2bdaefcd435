"""Logistic: what Newton needs of many logistic losses, from their scores, in one pass over them."""

from __future__ import annotations  # the kernel's tl.constexpr, before Triton is imported

import functools
from typing import Any, NamedTuple

import torch

# Rows and columns of one program, whose sums stay in registers.
_ROWS, _COLUMNS = 64, 32


# Scores that the reference works on at a time.
_CACHED = 1 << 15


class Losses(NamedTuple):
    """Value and derivatives of logistic losses, all of the scores' dtype.

    loss, slope, curve : (..., k) sums over the rows: of the loss, and of its first and second derivative.
    residual, curvature : (..., n, k) these derivatives, by the score.
    """

    loss: torch.Tensor
    slope: torch.Tensor
    curve: torch.Tensor
    residual: torch.Tensor
    curvature: torch.Tensor


def logistic_losses(
    scores: torch.Tensor, intercept: torch.Tensor, sign: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Losses:
    """Of each column j, sum_i weight_ij log(1 + exp(-sign_ij (scores_ij + intercept_j))).

    scores : (..., n, k) float32 or float64, contiguous.  intercept : (..., k).
    sign : (..., n, k) 1 for the positive class, else -1, as numbers of the scores' dtype.
    rows : (..., n) weight of each row, 0 for one that does not count.
    columns : (..., 2, k) weights of a column's negative and positive rows: weight_ij = rows_i columns[class]_j.

    On CUDA sums are taken over tiles of rows, then over tiles, always in the same order.

    ValueError where a shape or a dtype does not fit; ImportError on CUDA without Triton.
    """
    _check(scores, intercept, sign, rows, columns)
    if scores.is_cuda:
        with torch.cuda.device(scores.device):  # Triton launches on the current device
            return logistic_losses_triton(scores, intercept, sign, rows, columns)
    return logistic_losses_reference(scores, intercept, sign, rows, columns)


def logistic_losses_reference(
    scores: torch.Tensor, intercept: torch.Tensor, sign: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Losses:
    """logistic_losses in plain torch, on any device, some rows at a time: on a CPU they stay in its cache."""
    *batch, n, k = scores.shape
    residual, curvature = torch.empty_like(scores), torch.empty_like(scores)
    sums = scores.new_zeros(3, *batch, k)
    negative, positive = columns[..., :1, :], columns[..., 1:, :]
    even = torch.equal(negative, positive)
    step = max(1, _CACHED // max(1, scores.numel() // max(1, n)))
    other = scores.new_empty(2, *batch, min(step, n), k)
    for start in range(0, n, step):
        at = (..., slice(start, min(n, start + step)), slice(None))
        margin, right = other[..., : min(step, n - start), :]
        wrong, bend, side = residual[at], curvature[at], sign[at]
        weight = rows[..., at[-2], None] * (negative if even else torch.where(side > 0, positive, negative))
        torch.add(scores[at], intercept[..., None, :], out=margin).mul_(side).neg_()
        torch.sigmoid(margin, out=wrong)
        torch.sub(1.0, wrong, out=right)
        torch.mul(wrong, right, out=bend).mul_(weight)
        # log(1 + exp(m)) = max(m, 0) - log max(sigma(m), sigma(-m))
        loss = margin.clamp_(min=0.0).sub_(torch.maximum(wrong, right, out=right).log_()).mul_(weight)
        wrong.mul_(weight).mul_(side).neg_()
        for total, part in zip(sums, (loss, wrong, bend), strict=True):
            total += part.sum(-2)
    return Losses(*sums, residual, curvature)


def logistic_losses_triton(
    scores: torch.Tensor, intercept: torch.Tensor, sign: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Losses:
    """logistic_losses by the Triton kernel: on the current CUDA device, or on a CPU under TRITON_INTERPRET=1."""
    *batch, n, k = scores.shape
    residual, curvature = torch.empty_like(scores), torch.empty_like(scores)
    tiles = -(-n // _ROWS)
    sums = scores.new_zeros(3, *batch, tiles, k)
    count = scores.numel() // max(1, n * k)
    if scores.numel():
        _jitted()[(tiles, -(-k // _COLUMNS), count)](
            scores, intercept.contiguous(), sign.contiguous(), rows.contiguous(),
            columns.contiguous(), residual, curvature, sums, n, k, count, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return Losses(*sums.sum(-2), residual, curvature)


@functools.cache
def _jitted() -> Any:
    """The kernel, compiled or interpreted. Triton is imported here, so that a CPU needs only torch."""
    global tl  # the kernel's source is compiled with this module's names
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        message = (
            f"Fitting probes on CUDA needs Triton, which cannot be imported ({error}): install the package triton."
        )
        raise ImportError(message) from error
    return triton.jit(_losses)


def _losses(
    scores, intercept, sign, rows, columns, residual, curvature, sums, n, k, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and columns of one problem of the batch."""
    tile, problem = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < n, column < k
    inside = in_rows[:, None] & in_columns[None, :]
    place = problem * n * k + row.to(tl.int64)[:, None] * k + column[None, :]
    z = tl.load(scores + place, mask=inside, other=0.0)
    z += tl.load(intercept + problem * k + column, mask=in_columns, other=0.0)[None, :]
    is_positive = tl.load(sign + place, mask=inside, other=1.0) > 0.0
    of_row = tl.load(rows + problem * n + row, mask=in_rows, other=0.0)[:, None]
    negative_weight = tl.load(columns + problem * 2 * k + column, mask=in_columns, other=0.0)[None, :]
    positive_weight = tl.load(columns + (problem * 2 + 1) * k + column, mask=in_columns, other=0.0)[None, :]
    weight = tl.where(is_positive, positive_weight, negative_weight) * of_row
    margin = tl.where(is_positive, z, -z)
    decay = tl.exp(-tl.abs(margin))
    one = 1.0 + decay
    shrink = 1.0 / one
    wrong = tl.where(margin >= 0, decay * shrink, shrink)
    # log(1 + decay), also where 1 + decay has lost bits of decay (Kahan)
    lost = one - 1.0
    log = tl.where(lost == 0.0, decay, tl.log(one) * decay / tl.where(lost == 0.0, 1.0, lost))
    loss = weight * (log - tl.minimum(margin, 0.0))
    first = weight * wrong
    first = tl.where(is_positive, -first, first)
    second = weight * decay * shrink * shrink
    tl.store(residual + place, first, mask=inside)
    tl.store(curvature + place, second, mask=inside)
    tiles = tl.num_programs(0)
    at = (problem * tiles + tile) * k + column
    every = count.to(tl.int64) * tiles * k
    tl.store(sums + at, tl.sum(tl.where(inside, loss, 0.0), 0), mask=in_columns)
    tl.store(sums + every + at, tl.sum(tl.where(inside, first, 0.0), 0), mask=in_columns)
    tl.store(sums + 2 * every + at, tl.sum(tl.where(inside, second, 0.0), 0), mask=in_columns)


def _check(
    scores: torch.Tensor, intercept: torch.Tensor, sign: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> None:
    """Refuse what the kernel would read wrongly: it knows addresses, not tensors."""
    *batch, n, k = scores.shape if scores.ndim >= 2 else (-1, -1)
    shapes = {
        "intercept": (intercept, (*batch, k)), "sign": (sign, (*batch, n, k)), "rows": (rows, (*batch, n)),
        "columns": (columns, (*batch, 2, k)),
    }  # fmt: skip
    if scores.ndim < 2 or scores.dtype not in (torch.float32, torch.float64) or not scores.is_contiguous():
        raise ValueError(
            f"logistic_losses: scores are {tuple(scores.shape)} {scores.dtype} strides {scores.stride()}; expected "
            f"(..., n, k), float32 or float64, contiguous."
        )
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape or tensor.dtype != scores.dtype or tensor.device != scores.device:
            raise ValueError(
                f"logistic_losses: {name} is {tuple(tensor.shape)} {tensor.dtype} {tensor.device}; expected {shape} "
                f"{scores.dtype} {scores.device}."
            )
