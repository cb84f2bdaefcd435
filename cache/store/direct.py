"""GPU-direct reads: byte ranges of shard files straight into GPU memory, through kvikio (cuFile).

The bytes never pass the CPU, which is what verifies them: so this is taken only where the caller asks for no check.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.opened import Committed
from hiddenlake.cache.store.ranges import Part

if TYPE_CHECKING:
    import torch


def available() -> bool:
    """Whether kvikio is installed and GPUDirect Storage works, not its fallback through host memory."""
    try:
        import kvikio
        import kvikio.cufile_driver
    except ImportError:
        return False
    return not kvikio.defaults.is_compat_mode_preferred() and bool(kvikio.cufile_driver.get("is_gds_available"))


def can_read(reads: Sequence[tuple[Committed, Sequence[Part]]]) -> bool:
    """Whether all bytes of a read are plain ranges of local files: whole chunks, as they are."""
    return all(
        isinstance(committed.place, LocalBackend)
        and committed.shape.codec == "none"
        and all(len(part.slots) == committed.shape.rows for part in parts)
        for committed, parts in reads
    )


def read(reads: Sequence[tuple[Committed, Sequence[Part]]], out: "torch.Tensor", open_file=None) -> None:
    """Fill out (cell, row, width) on a device, unchecked. Raises CorruptError where a file ends too early.

    open_file : opens a path for `pread(buffer, size, file_offset)` futures; kvikio.CuFile where it is not given.
    """
    import torch

    if open_file is None:
        import kvikio

        open_file = kvikio.CuFile
    for committed, parts in reads:
        shape = committed.shape
        with open_file(f"{committed.place}/{committed.name}", "r") as file:
            for part in parts:
                into = torch.as_tensor(part.into[np.argsort(part.slots)], device=out.device)
                page = torch.empty((len(part.places), shape.chunk_bytes), dtype=torch.uint8, device=out.device)
                waiting = [
                    file.pread(page[i], shape.chunk_bytes, int(place) * shape.pitch)
                    for i, place in enumerate(part.places.tolist())
                ]
                for future in waiting:
                    if (got := future.get()) != shape.chunk_bytes:
                        raise CorruptError(
                            f"{committed}: {got} of {shape.chunk_bytes} bytes of a chunk came: {committed.remedy}"
                        )
                rows = page.view(out.dtype).reshape(len(part.places), shape.rows, shape.width)
                for i, cell in enumerate(part.cells.tolist()):
                    out[cell, into] = rows[i]
