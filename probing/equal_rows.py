"""Equal rows: which samples of a cell have the same activations, bit for bit."""

import hashlib

import numpy as np

from hiddenlake.probing.solvers import torch

# Of one block of rows, copied.
_BLOCK_BYTES = 8 << 20

# Rows that differ in so many leading features are not looked at further.
_HEAD = 8


def first_equal_row(X: np.ndarray | torch.Tensor) -> np.ndarray:
    """(n,) int for each row, the first row that equals it; 0.0 and -0.0 are equal.

    X : (n, d), any float dtype, NumPy's or a tensor on any device. It is not copied as a whole.

    Rows whose heads are equal are compared by BLAKE2b of 128 bits: two that differ are taken for equal once in 2^64.
    """
    n = len(X)
    heads = _bits(X[:, :_HEAD])
    heads = heads.view(np.dtype((np.void, heads.itemsize * heads.shape[1]))).ravel()
    _, first, inverse, count = np.unique(heads, return_index=True, return_inverse=True, return_counts=True)
    out = first[inverse]
    left = np.flatnonzero(count[inverse] > 1)
    seen: dict[bytes, int] = {}
    step = max(1, _BLOCK_BYTES // max(1, X.shape[1] * X.dtype.itemsize))
    for start in range(0, len(left), step):
        part = left[start : start + step]
        block = _bits(X[part] if n > len(part) else X)
        for i, row in zip(part.tolist(), block, strict=True):
            out[i] = seen.setdefault(hashlib.blake2b(row, digest_size=16).digest(), i)
    return out


def _bits(X: np.ndarray | torch.Tensor) -> np.ndarray:
    """A copy as unsigned integers, C-contiguous, in which -0.0 is 0.0."""
    if isinstance(X, torch.Tensor):
        X = X.cpu()
        X = X.view(torch.int16).numpy() if X.dtype == torch.bfloat16 else X.numpy()
    bits = np.array(X, order="C").view(f"u{X.itemsize}")
    bits[bits == bits.dtype.type(1 << (8 * bits.itemsize - 1))] = 0
    return bits
