"""Meter: what a person sees of a transfer, on stderr. A bar in a terminal, a line every ten seconds elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hiddenlake.cache.exchange.cost import Cost, Watcher
from hiddenlake.cache.progress import size

_QUIET_SECONDS = 10.0


class Meter(Watcher):
    """Prints the cost first, then bytes, rate and time left. A context manager. what : `exporting`, `importing`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = None
        self._begun = self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def planned(self, cost: Cost) -> None:
        table = f" and up to {size(cost.table_bytes)} of their table" if cost.table_bytes else ""
        free = "" if cost.disk_free is None else f" ({size(cost.disk_free)} of disk free)"
        self.console.print(
            f"{cost.samples} samples, {cost.files} files: {cost.data_bytes} bytes ({size(cost.data_bytes)}) of "
            f"activations{table}{free}, up to {size(cost.memory_bytes)} of memory"
            + (f"; {cost.note}" if cost.note else ""),
            soft_wrap=True,
        )
        self._begun = self._said = time.perf_counter()
        self._task = self._bar.add_task("", total=cost.data_bytes)
        self._bar.start()

    def progressed(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        now = time.perf_counter()
        if self._bar.disable and now - self._said >= _QUIET_SECONDS:
            self._said = now
            rate = done / max(now - self._begun, 1e-9) / 1e6
            self.console.print(f"{self.what}: {size(done)} of {size(total)}, {rate:.1f} MB/s", soft_wrap=True)
