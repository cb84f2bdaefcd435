"""Problem: many logistic regressions on the same rows, as columns of one batch.

Shape letters: n rows (samples), d features, F folds, L label sets, K columns (fold x C x label set).
A column minimises, in scikit-learn's convention,

    sum_i s_i log(1 + exp(-y_i z_i)) + l1_ratio ||w||_1 + 0.5 (1 - l1_ratio) ||w||^2,   z = X (w * unit) + b,   b free,

where s_i is C, times the weights of the sample and of its class, for the training rows of its fold, and 0 for others.

The rows are held once, as they were stored, and widened block by block. A fold is a zero weight on the rows outside it,
and its scaling is folded into the weights (z = X (w * unit)) instead of into a copy of X.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hiddenlake.cache.errors import ProbeError

SCALES = ("none", "rms", "feature")

# Of one block of rows, widened: on a CPU it stays in its cache, and the memory is asked for once; a GPU wants much at once.
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 20, 256 << 20

# Fewer rows than these make poor matrix products.
_BLOCK_ROWS = 128


class ScaledRows:
    """(n, d) rows in the coordinates of one fold: (X - centre) * unit, made block by block.

    X : (n, d), any float dtype.  centre, unit : (d,) float64.
    """

    def __init__(self, X: torch.Tensor, centre: torch.Tensor, unit: torch.Tensor) -> None:
        self.X, self.centre, self.unit = X, centre, unit

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which rows, these rows in a dtype). A block is overwritten by the next."""
        n, d = self.X.shape
        step = _rows_of_block(self.X, dtype)
        block = self.X.new_empty(min(n, step), d, dtype=dtype)
        centre, unit = self.centre.to(dtype), self.unit.to(dtype)
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            yield rows, self._widen(rows, block[: rows.stop - start], centre, unit)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """All of them."""
        every = slice(0, len(self.X))
        out = self.X.new_empty(self.X.shape, dtype=dtype)
        return self._widen(every, out, self.centre.to(dtype), self.unit.to(dtype))

    def _widen(self, rows: slice, out: torch.Tensor, centre: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.X[rows]).sub_(centre).mul_(unit)

    def scores(self, coef: torch.Tensor) -> torch.Tensor:
        """(n, k) scores without intercept of (d, k) weights, in their dtype."""
        out = coef.new_empty(len(self.X), coef.shape[1])
        for rows, block in self.blocks(coef.dtype):
            torch.mm(block, coef, out=out[rows])
        return out

    def pull(self, residual: torch.Tensor) -> torch.Tensor:
        """(d, k) gradient with respect to the weights of (n, k) derivatives with respect to the scores."""
        out = residual.new_zeros(self.X.shape[1], residual.shape[1])
        for rows, block in self.blocks(residual.dtype):
            out.addmm_(block.mT, residual[rows])
        return out

    def take(self, rows: torch.Tensor) -> "ScaledRows":
        """Some of the rows, copied as they were stored. rows : (m,) int."""
        return ScaledRows(self.X[rows], self.centre, self.unit)


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of one fold, on some of its rows.

    rows : the rows.  weight : (n,) float64 of each row, 0 outside the training rows.
    positive : (n, k) bool.  strength : (2, k) float64, C times the weight of the negative and of the positive class.
    """

    rows: ScaledRows
    weight: torch.Tensor
    positive: torch.Tensor
    strength: torch.Tensor
    l1_ratio: float = 0.0

    def __getitem__(self, chosen: torch.Tensor) -> "Columns":
        """Some of the columns. chosen : (m,) int."""
        return Columns(self.rows, self.weight, self.positive[:, chosen], self.strength[:, chosen], self.l1_ratio)

    def training(self) -> "Columns":
        """On the training rows only."""
        inside = self.weight.nonzero().ravel()
        return Columns(self.rows.take(inside), self.weight[inside], self.positive[inside], self.strength, self.l1_ratio)

    def weights(self) -> torch.Tensor:
        """(n, k) s_i."""
        return self.weight[:, None] * torch.where(self.positive, self.strength[1], self.strength[0])

    def cpu(self) -> "Columns":
        rows = ScaledRows(*(x.cpu() for x in (self.rows.X, self.rows.centre, self.rows.unit)))
        return Columns(rows, self.weight.cpu(), self.positive.cpu(), self.strength.cpu(), self.l1_ratio)


@dataclass(frozen=True, slots=True)
class Problem:
    """K logistic regressions on the same n rows.

    X : (n, d), any float dtype, on any device.
    centre : (d,) float64, the mean of all rows: the intercept takes the mean up, so no optimum changes.
    labels : (L, n) bool.
    train : (F, n) float64, the weight of each row in each fold, 0 for those outside its training rows.
    unit : (F, d) float64, what each feature is multiplied by in each fold; 0 where it is constant there.
    fold, label_set : (K,) int64, the fold and the label set of each column.
    strength : (2, K) float64, C times the weight of the negative and of the positive class.
    l1_ratio : the share of the penalty that is l1.
    """

    X: torch.Tensor
    centre: torch.Tensor
    labels: torch.Tensor
    train: torch.Tensor
    unit: torch.Tensor
    fold: torch.Tensor
    label_set: torch.Tensor
    strength: torch.Tensor
    l1_ratio: float = 0.0

    def columns(self, fold: int, chosen: torch.Tensor) -> Columns:
        """Some columns of a fold. chosen : (k,) int64."""
        rows = ScaledRows(self.X, self.centre, self.unit[fold])
        return Columns(
            rows,
            self.train[fold],
            self.labels[self.label_set[chosen]].mT.contiguous(),
            self.strength[:, chosen],
            self.l1_ratio,
        )

    def coordinates(self, fold: int, rows: np.ndarray) -> np.ndarray:
        """(m, d) float64 rows in the coordinates of a fold's weights. rows : (m,) int."""
        chosen = torch.as_tensor(rows, device=self.X.device)
        return ScaledRows(self.X, self.centre, self.unit[fold]).take(chosen).matrix(torch.float64).cpu().numpy()

    def by_fold(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(fold, its columns)."""
        for fold in range(len(self.train)):
            chosen = (self.fold == fold).nonzero().ravel()
            if len(chosen):
                yield fold, chosen


@dataclass(frozen=True, slots=True)
class Solution:
    """K fitted probes in the coordinates of their Problem, each with its certificate.

    coef : (d, K) float64.  intercept : (K,).
    objective, gap_bound : (K,): the objective is at most gap_bound above the optimum.
    n_iter : (K,) int, Newton or L-BFGS steps.  converged : (K,) bool, gap_bound <= tol * objective.
    """

    coef: np.ndarray
    intercept: np.ndarray
    objective: np.ndarray
    gap_bound: np.ndarray
    n_iter: np.ndarray
    converged: np.ndarray


def make_problem(
    X: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    train: np.ndarray,
    *,
    C: np.ndarray,
    fold: np.ndarray,
    label_set: np.ndarray,
    scale: str = "feature",
    class_weight: np.ndarray | None = None,
    l1_ratio: float = 0.0,
) -> Problem:
    """Columns over the rows of one cell.

    X : (n, d), any float, which is not copied; bfloat16 of ml_dtypes too.
    labels : (L, n) bool.  train : (F, n), whether, or with which weight, each fold trains on each row.
    C, fold, label_set : (K,) which C, fold and label set each column has.
    scale : `none`, `rms` (one number a fold) or `feature` (standard deviation of each feature), from
        the training rows of the fold, whatever their weights.
    class_weight : (K, 2) of each column's negative and positive class; 1 by default.
    l1_ratio : from 0, an l2 penalty, to 1, an l1 penalty.

    Raises ProbeError when X holds values that are not finite, or a column has one class only.
    """
    if scale not in SCALES:
        raise ProbeError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    X = as_tensor(X)
    finite = finite_rows(X)
    if not finite.all():
        raise ProbeError(f"{int((~finite).sum())} of {len(X)} rows hold NaN or infinity: leave them out with `mask`")
    on = {"device": X.device}
    train, labels = torch.as_tensor(train, dtype=torch.float64, **on), torch.as_tensor(labels, dtype=torch.bool, **on)
    fold, label_set = (torch.as_tensor(which, dtype=torch.int64, **on) for which in (fold, label_set))
    centre, unit = _scales(X, (train > 0).double(), scale)
    positive = (train[fold] > 0) & labels[label_set]
    counts = positive.sum(1), (train[fold] > 0).sum(1)
    lacking = ((counts[0] == 0) | (counts[0] == counts[1])).nonzero().ravel()
    if len(lacking):
        raise ProbeError(
            f"fold {int(fold[lacking[0]])} has one class only among its training rows ({len(lacking)} of "
            f"{len(fold)} columns): use fewer folds or other groups"
        )
    strength = torch.as_tensor(C, dtype=torch.float64, **on).expand(2, -1)
    if class_weight is not None:
        strength = strength * torch.as_tensor(class_weight, dtype=torch.float64, **on).mT
    return Problem(X, centre, labels, train, unit, fold, label_set, strength, l1_ratio)


def finite_rows(X: torch.Tensor) -> torch.Tensor:
    """(n,) bool, whether all of a row is finite; looked at block by block."""
    step = _rows_of_block(X, X.dtype)
    return torch.cat([block.isfinite().all(1) for block in X.split(step)])


def as_tensor(X: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor; bfloat16 as torch has it."""
    if isinstance(X, torch.Tensor):
        return X
    X = np.asarray(X)
    if X.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(X).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(X))


def _rows_of_block(X: torch.Tensor, dtype: torch.dtype) -> int:
    size = _CPU_BLOCK_BYTES if X.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(_BLOCK_ROWS, size // max(1, X.shape[1] * dtype.itemsize))


def _scales(X: torch.Tensor, train: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """centre (d,) and unit (F, d). train : (F, n) float64, 1 for training rows."""
    n, d = X.shape
    one = torch.ones(d, dtype=torch.float64, device=X.device)
    centre = sum(block.sum(0) for _, block in ScaledRows(X, 0 * one, one).blocks(torch.float64)) / n
    count = train.sum(1, keepdim=True)
    sums, squares = torch.zeros_like(train[:, :1] @ one[None]), torch.zeros_like(train[:, :1] @ one[None])
    for rows, block in ScaledRows(X, centre, one).blocks(torch.float64):
        sums.addmm_(train[:, rows], block)
        squares.addmm_(train[:, rows], block.square_())
    mean = sums / count
    # rows are centred over all folds, so that this difference of squares does not cancel
    variance = (squares / count - mean**2).clamp_min_(0.0)
    # A column of one repeated value has a variance of rounding errors. The bound is scikit-learn's
    # (sklearn.preprocessing._data._is_constant_feature).
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * (mean + centre).abs() * eps) ** 2
    if scale == "none":
        unit = torch.ones_like(variance)
    elif scale == "rms":
        rms = variance.masked_fill(constant, 0.0).mean(1, keepdim=True).sqrt()
        unit = (1.0 / torch.where(rms > 0, rms, 1.0)).expand_as(variance)
    else:
        unit = 1.0 / variance.masked_fill(constant, 1.0).sqrt()
    return centre, unit.masked_fill(constant, 0.0)
