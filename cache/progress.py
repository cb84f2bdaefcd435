"""Progress: what a person sees of a capture, on stderr. A bar in a terminal, a line every ten seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hiddenlake.cache.capture import Summary, Watcher
from hiddenlake.cache.estimate import Estimate

_QUIET_SECONDS = 10.0


class ProgressBar(Watcher):
    """Prints the cost before a run and its rates while it runs. A context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("capturing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
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

    def planned(self, cost: Estimate, summary: Summary) -> None:
        room = "object storage" if cost.disk_free is None else f"disk ({size(cost.disk_free)} free)"
        self.console.print(
            f"{summary.planned} samples, {summary.present} of them captured before; {cost.samples} to capture: "
            f"{size(cost.disk_bytes)} of {room}, {size(cost.buffer_bytes)} of shard buffers, "
            f"up to {size(cost.ring_bytes)} of ring for {cost.in_flight} samples at once"
            + (
                f", {size(cost.device_bytes)} of each GPU ({cost.kv_tokens} tokens of KV cache)"
                if cost.device_bytes
                else ""
            ),
            soft_wrap=True,
        )
        self._total = cost.samples
        if cost.samples:
            self.console.print("starting the engine")

    def started(self) -> None:
        self._begun = self._said = time.perf_counter()
        self._task = self._bar.add_task("", total=self._total, rates="")
        self._bar.start()

    def progressed(self, summary: Summary) -> None:
        now = time.perf_counter()
        seconds = max(now - self._begun, 1e-9)
        rates = (
            f"{summary.committed / seconds:.1f} samples/s, {summary.tokens / seconds:.0f} tokens/s, "
            f"{summary.bytes / seconds / 1e6:.1f} MB/s" + (f", {summary.failed} failed" if summary.failed else "")
        )
        done = summary.committed + summary.failed
        self._bar.update(self._task, completed=done, rates=rates)
        if self._bar.disable and now - self._said >= _QUIET_SECONDS:
            self._said = now
            self.console.print(f"{done}/{self._total} samples, {rates}", soft_wrap=True)


def size(n: float) -> str:
    """Bytes as a person reads them, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for counted work, on stderr. Yields a function of (done, total) for the work to call."""
    console = Console(stderr=True, highlight=False)
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
