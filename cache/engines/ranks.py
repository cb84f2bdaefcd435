"""Ranks: a placement is stored once every rank of the engine has stored its part."""

from collections.abc import Iterable


class Ranks:
    """Joins what the ranks report. count : how many there are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._reports: dict[str, list[str | None]] = {}

    def merge(self, found: Iterable[Iterable[tuple[str, str | None]]]) -> list[tuple[str, str | None]]:
        """(key, None or the first cause) of each placement that all ranks have reported by now.

        found : one list of (key, None or cause) a rank, as the workers' hiddenlake_store and hiddenlake_stored return.
        """
        merged = []
        for key, cause in (report for rank in found for report in rank):
            reports = self._reports.setdefault(key, [])
            reports.append(cause)
            if len(reports) == self.count:
                merged.append((key, next((cause for cause in self._reports.pop(key) if cause is not None), None)))
        return merged
