"""Values: other tools' numbers as the bits that a capture stores, exactly or not at all."""

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store.coverage import DTYPES

# What activations may be: the names in safetensors -> those of models and of the store.
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FLOATS = tuple(NAMES)


def stored_dtype(found: set[str], asked: str | None) -> str:
    """What is stored of tensors of these dtypes: their own where it is one that a capture can have, else float32, which
    holds all of them exactly.

    found : safetensors names.  asked : what the user wants, or None.
    """
    if asked is not None and asked not in DTYPES:
        raise BadInputError(f"dtype {asked!r} cannot be stored: expected one of {', '.join(DTYPES)}")
    own = {NAMES[name] for name in found}
    return asked or (own.pop() if len(own) == 1 and own <= DTYPES.keys() else "float32")


def to_bits(values: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Values of bfloat16, float16 or float32 as the store's bits of `dtype`, any shape.

    Raises BadInputError where a value would be rounded; absent values (NaN) stay NaN.
    """
    bits, kind, _ = DTYPES[dtype]
    if values.dtype == kind:
        return values.view(bits)
    wide = values.astype(np.float32)
    if dtype == "float32":
        return wide
    with np.errstate(over="ignore"):  # what does not fit is infinite, and so not equal
        narrow = wide.astype(kind)
    if not np.array_equal(narrow.astype(np.float32), wide, equal_nan=True):
        raise BadInputError(f"{where}: {values.dtype} values are not exact in {dtype}: import them with dtype float32")
    return narrow.view(bits)
