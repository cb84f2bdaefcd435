"""Equal rows, against a comparison of each row with each other."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.probing import equal_rows
from hiddenlake.probing.equal_rows import first_equal_row
from hiddenlake.probing.solvers.problem import as_tensor

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 40), d=st.integers(1, 20), kinds=st.integers(1, 5), seed=st.integers(0, 99), same=st.booleans())
def test_the_first_equal_row_is_the_first_equal_row(dtype, n, d, kinds, seed, same):
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 2, (kinds, d)).astype(np.float32)
    if same:
        table[:, :8] = 1.0  # heads tell nothing
    X = table[rng.integers(0, kinds, n)]
    X = (X * np.where(X == 0, rng.choice([-1.0, 1.0], (n, d)), 1.0)).astype(dtype)  # 0.0 and -0.0
    expected = [next(j for j in range(n) if (X[j] == X[i]).all()) for i in range(n)]
    assert first_equal_row(X).tolist() == expected
    assert first_equal_row(as_tensor(X)).tolist() == expected


def test_rows_are_hashed_block_by_block(monkeypatch):
    X = np.tile(np.arange(5, dtype=np.float32), (30, 4)).reshape(30, 20)
    X[17:, 19] = 7.0
    monkeypatch.setattr(equal_rows, "_BLOCK_BYTES", 3 * X.strides[0])
    assert first_equal_row(X).tolist() == [0] * 17 + [17] * 13
    assert first_equal_row(torch.from_numpy(X)[::2]).tolist() == [0] * 9 + [9] * 6
