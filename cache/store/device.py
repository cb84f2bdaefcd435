"""Activations on a device: read into pinned memory, copied asynchronously, handed on through DLPack.

One copy on the host: from the page cache into pinned memory. On a machine without CUDA, `device="cpu"` runs the same code
with memory that is not pinned.
"""

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import StoreError

if TYPE_CHECKING:
    import torch

# shape, dtype -> memory that a read fills
Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


# Copies that were started, oldest first: what tells that one is done, and the memory that it reads.
_copying: "deque[tuple[torch.cuda.Event, torch.Tensor]]" = deque()
_lock = threading.Lock()


class Staging:
    """Host memory on its way to one device.

    device : `cpu`, `cuda`, `cuda:1`.

    Raises StoreError where torch or the device is missing.
    """

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise StoreError(
                f"device={device!r} needs torch, which is not installed: pip install 'hiddenlake[transformers]'"
            ) from error
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise StoreError(f"device={device!r} is no device: expected e.g. cpu, cuda or cuda:1") from error
        self._cuda = self.device.type == "cuda"
        if self._cuda and not torch.cuda.is_available():
            raise StoreError(
                f"device={device!r}: this machine has no CUDA device that torch can use: read without `device`"
            )
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory that can be copied from asynchronously."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        # torch keeps freed pinned memory for the next time, and until copies from it are done.
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        return memory.numpy().view(dtype).reshape(shape)

    def send(self, values: np.ndarray) -> "torch.Tensor":
        """A tensor on the device, of the same dtype; the copy is ordered before what the current stream does next.

        values : of `allocate`, or a view of it.
        """
        import torch

        bits = values.view(np.uint16) if values.dtype.itemsize == 2 else values
        kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(values.dtype.name)
        host = torch.from_numpy(bits)
        if not self._cuda:
            return host if kind is None else host.view(kind)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            sent = host.to(self.device, non_blocking=True)
        current.wait_stream(self._stream)
        # The tensor's memory is not given away while `current` uses it, nor the host's while it is copied from: torch
        # knows pinned memory by where it begins, and `values` may be a part of it.
        sent.record_stream(current)
        with _lock:
            _copying.append((self._stream.record_event(), host))
            while _copying and _copying[0][0].query():
                _copying.popleft()
        return sent if kind is None else sent.view(kind)


def to_array(tensor: "torch.Tensor") -> Any:
    """A tensor as CuPy where it is on a GPU, else as NumPy, through DLPack: without a copy. Not for bfloat16.

    Raises StoreError where CuPy is missing.
    """
    if not tensor.is_cuda:
        return tensor.numpy()
    try:
        import cupy
    except ImportError as error:
        raise StoreError("arrays on a GPU need CuPy, which is not installed: pip install 'hiddenlake[cuml]'") from error
    return cupy.from_dlpack(tensor)
