"""Jobs: what one request has asked to be computed, followed until it is there."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import no_such

# Jobs that are remembered after their end.
_KEPT_SECONDS = 7 * 86400.0


class Job(BaseModel):
    """How far it is."""

    id: str
    state: Literal["running", "done", "failed", "cancelled"] = Field(
        description="failed: some answers could not be computed."
    )
    created: float = Field(description="Seconds since 1970.")
    total: int
    pending: int
    leased: int = Field(description="Answers that a worker is at work on.")
    done: int
    failed: int
    causes: list[str] = Field(description="Why answers failed: the first few that differ.")


class Jobs:
    """Of one lake. May be used from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, numbers: Sequence[int], caller: Caller) -> str:
        """A job of work that is queued, by its numbers. Returns its id."""
        id = secrets.token_hex(8)
        with self._database.write() as cursor:
            cursor.execute("DELETE FROM jobs WHERE created < ?", (time.time() - _KEPT_SECONDS,))
            cursor.execute(
                "INSERT INTO jobs (id, owner, tenant, created) VALUES (?, ?, ?, ?)",
                (id, caller.id, caller.tenant or "", time.time()),
            )
            cursor.executemany("INSERT OR IGNORE INTO items (job, work) VALUES (?, ?)", [(id, n) for n in numbers])
        return id

    def get(self, id: str, caller: Caller) -> Job:
        """Raises Problem (404) for one that is not the caller's."""
        rows = self._select("WHERE id = ?", (id,))
        if not rows or not _sees(rows[0], caller):
            raise no_such("job", "GET /v1/jobs lists yours")
        return self._job(rows[0])

    def newest(self, caller: Caller, most: int) -> list[Job]:
        """The newest first."""
        return [self._job(row) for row in self._select("ORDER BY created DESC LIMIT 10000", ()) if _sees(row, caller)][
            :most
        ]

    def cancel(self, id: str, caller: Caller) -> Job:
        """Compute no more of it, but for what another job wants too, or a worker is at work on. Raises Problem (404)."""
        self.get(id, caller)
        with self._database.write() as cursor:
            cursor.execute("UPDATE jobs SET cancelled = ? WHERE id = ? AND cancelled IS NULL", (time.time(), id))
            cursor.execute(
                "UPDATE work SET state = 'failed', ids = NULL, cause = 'cancelled' WHERE state = 'pending' AND number IN"
                " (SELECT work FROM items WHERE job = ?) AND number NOT IN"
                " (SELECT work FROM items JOIN jobs ON jobs.id = items.job WHERE jobs.id != ? AND jobs.cancelled IS NULL)",
                (id, id),
            )
        return self.get(id, caller)

    def _select(self, where: str, values: tuple[Any, ...]) -> list[Any]:
        return self._database.read(f"SELECT id, owner, tenant, created, cancelled FROM jobs {where}", values)

    def _job(self, row: Any) -> Job:
        counts = dict.fromkeys(("pending", "leased", "done", "failed"), 0)
        for state, n in self._database.read(
            "SELECT state, count(*) FROM items JOIN work ON work.number = items.work WHERE job = ? GROUP BY state",
            (row["id"],),
        ):
            counts[state] = n
        causes = self._database.read(
            "SELECT DISTINCT cause FROM items JOIN work ON work.number = items.work"
            " WHERE job = ? AND state = 'failed' LIMIT 5",
            (row["id"],),
        )
        over = not counts["pending"] and not counts["leased"]
        ended = "failed" if counts["failed"] else "done"
        return Job(
            id=row["id"], created=row["created"], total=sum(counts.values()), causes=[cause["cause"] for cause in causes],
            state="cancelled" if row["cancelled"] is not None else ended if over else "running", **counts,
        )  # fmt: skip


def _sees(row: Any, caller: Caller) -> bool:
    return row["owner"] == caller.id or (caller.may("admin") and (caller.tenant or "") in ("", row["tenant"]))
