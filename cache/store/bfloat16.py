"""The Zarr v3 data type `bfloat16`, whose name the zarr-extensions registry holds but zarr-python lacks.

zarr 3.4 loads the class from the entry point group `zarr.data_type`. zarr 3.1 lists entry points and
never loads them; there `register()` must be called, which `import hiddenlake` sees to.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import EndiannessStr, HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import float_from_json_v3, float_to_json_v3
from zarr.core.dtype.wrapper import ZDType

try:
    from zarr.errors import DataTypeValidationError
except ImportError:  # zarr 3.1
    from zarr.dtype import DataTypeValidationError

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any], HasItemSize, HasEndianness):
    """bfloat16 as `ml_dtypes.bfloat16`, 2 bytes, little-endian on disk unless the codec says otherwise."""

    dtype_cls = type(_BFLOAT16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    endianness: EndiannessStr = "little"

    @classmethod
    def _check_native_dtype(cls, dtype: np.dtype) -> bool:
        return dtype == _BFLOAT16

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    def to_native_dtype(self) -> np.dtype:
        return _BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name or data == {"name": cls._zarr_v3_name}:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_json(self, zarr_format: int) -> str:
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError(f"bfloat16 exists in Zarr v3 only, not in v{zarr_format}")

    def _check_scalar(self, data: Any) -> bool:
        return isinstance(data, (int, float, np.floating, np.integer, ml_dtypes.bfloat16))

    def cast_scalar(self, data: Any) -> Any:
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(data)
        raise TypeError(f"{data!r} of type {type(data).__name__} cannot become a bfloat16 scalar: pass a number")

    def default_scalar(self) -> Any:
        return ml_dtypes.bfloat16(0)

    def to_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        return float_to_json_v3(np.float32(data))

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        if isinstance(data, str) and data.startswith("0x"):
            return np.array([int(data, 16)], np.uint16).view(_BFLOAT16)[0]
        return ml_dtypes.bfloat16(float_from_json_v3(data))

    @property
    def item_size(self) -> int:
        return _BFLOAT16.itemsize


def register() -> None:
    """Make zarr-python, and so xarray, read and write `bfloat16` in this process. Calling it twice is fine."""
    data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
