"""Values: other tools' numbers as the bits that a capture stores, exactly or not at all."""

import ml_dtypes
import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store.coverage import DTYPES

# The safetensors names of what activations may be.
FLOATS = ("BF16", "F16", "F32")
# and the names that models use for them
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def stored_dtype(found: set[str], asked: str | None) -> str:
    """What is stored of tensors of these dtypes: bfloat16 where all of them are, else float32, which holds all exactly.

    found : safetensors names.  asked : what the user wants, or None.
    """
    if asked is not None and asked not in DTYPES:
        raise BadInputError(f"dtype {asked!r} cannot be stored: expected {' or '.join(DTYPES)}")
    return asked or ("bfloat16" if found == {"BF16"} else "float32")


def to_bits(values: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Values of bfloat16, float16 or float32 as the store's bits of `dtype`, any shape.

    Raises BadInputError where a value would be rounded; absent values (NaN) stay NaN.
    """
    if dtype == "float32":
        return values.astype(np.float32)
    if values.dtype == _BFLOAT16:
        return values.view(np.uint16)
    wide = values.astype(np.float32)
    narrow = wide.astype(_BFLOAT16)
    if not np.array_equal(narrow.astype(np.float32), wide, equal_nan=True):
        raise BadInputError(f"{where}: {values.dtype} values are not exact in bfloat16: import them with dtype float32")
    return narrow.view(np.uint16)
