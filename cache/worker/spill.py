"""Spill: a scratch file for rows that the ring has no place for. Nothing is dropped."""

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
        for row in rows:
            number = self._free.pop() if self._free else self._rows
            try:
                done = os.pwrite(self._file.fileno(), memoryview(row).cast("B"), number * self._row.itemsize)
            except OSError as error:
                raise CaptureError(f"{self._folder}: rows could not be spilled ({error.strerror}): free some space") from error
            if done != self._row.itemsize:
                raise CaptureError(f"{self._folder}: rows could not be spilled (the disk is full): free some space")
            self._rows = max(self._rows, number + 1)
            numbers.append(number)
        return numbers

    def read(self, numbers: list[int]) -> np.ndarray:
        """(row, element) of the numbers."""
        out = np.empty(len(numbers), self._row)
        for row, number in zip(out, numbers, strict=True):
            os.preadv(self._file.fileno(), [memoryview(row).cast("B")], number * self._row.itemsize)
        return out

    def free(self, numbers: list[int]) -> None:
        self._free.extend(numbers)
