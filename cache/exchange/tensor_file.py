"""Tensor files: the safetensors format, written in a stream and read with every number checked first.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets, and
`__metadata__`, strings), and the tensors' bytes. The format's description and limits:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from hiddenlake.cache.errors import BadInputError

# The format's names of what can be activations or token ids -> as NumPy reads them.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
# Bits of an element of every type that the format knows; what is not in DTYPES cannot be read here, only stepped over.
_BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "U32": 32, "U64": 64, "C64": 64, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# The library's own limit.
_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file. start : of its bytes, from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What stands in front of the tensors' bytes, which follow one behind the other in the order given.

    tensors : name -> (the format's name of its dtype, shape).
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    # spaces, so that the data is aligned to 8 bytes
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise BadInputError(f"the header would have {len(text)} bytes, the format allows {_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """An open safetensors file: `tensors`, `metadata`, and rows of one tensor at a time. A context manager.

    Everything that the header says is checked against the file's size before anything is allocated for it, and the
    tensors must fill the file without a gap or an overlap. Raises BadInputError, naming file and tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_regular(path)
        try:
            self.tensors, self.metadata = self._header()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def _header(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise self._bad(f"its header claims {length} bytes, but the file has {size}")
        try:
            entries = json.loads(self._pread(8, length).tobytes(), object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is no JSON object without repeats ({error})") from error
        if not isinstance(entries, dict):
            raise self._bad("its header is no JSON object")
        metadata = entries.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad(f"{_METADATA} is no object of strings")
        data = 8 + length
        tensors = {name: self._tensor(name, entry, data) for name, entry in entries.items()}
        end = data
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if tensor.start != end:
                what = "overlaps another one" if tensor.start < end else "leaves a gap before it"
                raise self._bad(f"tensor {name!r} {what}, at byte {tensor.start}")
            end += tensor.nbytes
        if end != size:
            raise self._bad(f"its tensors end at byte {end}, but the file has {size} bytes")
        return tensors, metadata

    def _tensor(self, name: str, entry: Any, data: int) -> Tensor:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {name!r}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._bad(f"tensor {name!r}: unknown dtype {dtype!r}: expected one of {', '.join(_BITS)}")
        # more axes than NumPy has would only make the product below slow
        if not _counts(shape) or len(shape) > 64 or not _counts(offsets) or len(offsets) != 2:
            raise self._bad(f"tensor {name!r}: its shape and data_offsets are not a few whole numbers from 0")
        bits = math.prod(shape) * _BITS[dtype]
        if bits % 8 or offsets[1] - offsets[0] != bits // 8:
            raise self._bad(
                f"tensor {name!r}: data_offsets {offsets} do not span the {bits // 8} bytes of {dtype} {shape}"
            )
        return Tensor(dtype, tuple(shape), data + offsets[0], bits // 8)

    def tensor(self, name: str, dtypes: Sequence[str] = tuple(DTYPES)) -> Tensor:
        """One tensor's facts. Raises BadInputError where it is not there, or of another dtype."""
        if name not in self.tensors:
            raise self._bad(f"no tensor {name!r}: it has {', '.join(map(repr, self.tensors)) or 'none'}")
        found = self.tensors[name]
        if found.dtype not in dtypes:
            raise self._bad(f"tensor {name!r} is {found.dtype}: expected {', '.join(dtypes)}")
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop along a tensor's first axis; all of them by default. bfloat16 as ml_dtypes.bfloat16."""
        tensor = self.tensor(name)
        rows = tensor.shape[0] if tensor.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise self._bad(f"tensor {name!r} has {rows} rows: rows {start} to {stop} are not there")
        row_bytes = tensor.nbytes // rows if rows else 0
        raw = self._pread(tensor.start + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        return raw.view(DTYPES[tensor.dtype]).reshape(shape)

    def _pread(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        view, done = out.data, 0
        while done < count:
            # one call reads at most 2 GiB
            got = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], start + done)
            if not got:
                raise self._bad(f"it ends at byte {start + done}, {count - done} bytes too early")
            done += got
        return out

    def _bad(self, what: str) -> BadInputError:
        return BadInputError(f"{self.path} is no usable safetensors file: {what}")


def inside(root: Path, name: Any) -> Path:
    """The file `name` of a folder. Raises BadInputError for a name that leads out of it, or through a symbolic link."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadInputError(f"file name {name!r}: expected the name of a file in {root}")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadInputError(f"file name {name!r} leads out of {root}: expected a relative name without `..`")
    at = root
    for part in path.parts:
        at = at / part
        if at.is_symlink():
            raise BadInputError(f"{at} is a symbolic link: put the file itself there")
    return at


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file that is no symbolic link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        link = " (a symbolic link is not followed)" if path.is_symlink() else ""
        raise BadInputError(f"{path}: {error.strerror}{link}: expected a safetensors file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInputError(f"{path} is no regular file: expected a safetensors file")
    return descriptor


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found
