"""Spill: a scratch file for rows that the ring has no place for. Nothing is dropped."""

import errno
import os
import tempfile

import numpy as np

from hiddenlake.cache.errors import CaptureError


class Spill:
    """Packed rows on disk, numbered. The file has no name, so that a killed process leaves nothing."""

    def __init__(self, folder: str, elements: int, dtype: np.dtype) -> None:
        self._row = np.dtype((dtype, elements))
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)
        self._free: list[int] = []
        self._rows = 0

    @property
    def used(self) -> int:
        """Rows that lie in the file."""
        return self._rows - len(self._free)

    def write(self, rows: np.ndarray) -> list[int]:
        """Keep rows, (row, element). Returns their numbers. Raises CaptureError when the disk is full."""
        numbers = []
        try:
            for row in rows:
                numbers.append(self._take())
                done = os.pwrite(self._file.fileno(), memoryview(row).cast("B"), numbers[-1] * self._row.itemsize)
                if done != self._row.itemsize:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.free(numbers)
            raise CaptureError(
                f"{self._folder}: rows could not be spilled ({error.strerror}): free some space"
            ) from error
        return numbers

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._rows += 1
        return self._rows - 1

    def read(self, numbers: list[int]) -> np.ndarray:
        """(row, element) of the numbers."""
        out = np.empty(len(numbers), self._row)
        for row, number in zip(out, numbers, strict=True):
            os.preadv(self._file.fileno(), [memoryview(row).cast("B")], number * self._row.itemsize)
        return out

    def free(self, numbers: list[int]) -> None:
        self._free.extend(numbers)
