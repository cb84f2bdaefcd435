"""Cost: what an export or an import will take, said before it starts, and who is told how far it is."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.errors import StoreError


@dataclass(frozen=True, slots=True)
class Cost:
    """What a transfer takes, in bytes.

    samples : that are transferred.  files : that are written, or read.
    data_bytes : activations.  table_bytes : the samples' table, before compression.
    memory_bytes : most host memory for activations at a time, and the table.
    disk_free : what the target's disk has, None where that is not known.
    note : what is said beside the figures.
    """

    samples: int
    files: int
    data_bytes: int
    table_bytes: int
    memory_bytes: int
    disk_free: int | None
    note: str = ""

    def check(self) -> None:
        """Raise StoreError when the disk cannot hold it."""
        if self.disk_free is not None and self.data_bytes + self.table_bytes > self.disk_free:
            raise StoreError(
                f"the disk is too full: {(self.data_bytes + self.table_bytes) / 2**30:.2f} GiB are needed, "
                f"{self.disk_free / 2**30:.2f} GiB are free; free some space, or name fewer sites, layers or positions"
            )


class Watcher:
    """Is told of a transfer. This one listens to nothing."""

    def planned(self, cost: Cost) -> None:
        """Before anything is written."""

    def progressed(self, done: int, total: int) -> None:
        """So many bytes of activations are done. Called for every block of them."""


def disk_free(path: Path) -> int:
    """Bytes that are free where `path` will be."""
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
