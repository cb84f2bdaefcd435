"""Work: answers that were asked for and are not there, each computed once, by one worker that lives.

A worker that takes work holds a lease on it, which it must renew. What a dead worker held is another's once its lease is
over. That alone would not do: a worker may only have stood still, and wake up. So whoever takes over first sees to it that
the other's process has ended; and in the store, no key is written that a living writer has reserved.
"""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hiddenlake.cache.service import clock
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.plans import Offer, Plan

# SQLite takes so many values in one statement, everywhere.
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Wanted:
    """One answer that is to be computed.

    prompt : token ids.  given : of an answer that is fed, or None.  seed : of a sampled answer.  bytes : it will take.
    """

    key: str
    prompt: tuple[int, ...]
    given: tuple[int, ...] | None
    seed: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """Work that is done together: of one plan and one tenant."""

    plan: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Taken:
    """Work with a lease on it. attempts : workers that had it before."""

    number: int
    wanted: Wanted
    attempts: int


class Work:
    """The queue of one lake. May be used from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # What servers ask.

    def add(self, offer: Offer, plan: Plan, tenant: str, wanted: Sequence[Wanted]) -> list[int]:
        """Have answers computed, unless they are on their way. Returns the number of each in the queue.

        What failed before is tried again.
        """
        numbers = []
        with self._database.write() as cursor:
            cursor.execute(
                "INSERT OR IGNORE INTO plans (id, spec) VALUES (?, ?)", (plan.id, json.dumps(plan.to_json()))
            )
            for one in wanted:
                ids = json.dumps([one.prompt, one.given])
                cursor.execute(
                    "INSERT INTO work (key, plan, tenant, model, ids, seed, bytes, state, boot, enqueued)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', ?, ?) ON CONFLICT (key, plan, tenant) DO UPDATE SET"
                    " state = 'pending', ids = excluded.ids, attempts = 0, cause = NULL, worker = NULL, lease = NULL,"
                    " boot = excluded.boot, enqueued = excluded.enqueued WHERE state NOT IN ('pending', 'leased')",
                    (one.key, plan.id, tenant, offer.id, ids, one.seed, one.bytes, clock.boot(), clock.now()),
                )
                [number] = cursor.execute(
                    "SELECT number FROM work WHERE key = ? AND plan = ? AND tenant = ?", (one.key, plan.id, tenant)
                ).fetchone()
                numbers.append(number)
        return numbers

    def waiting_bytes(self) -> int:
        """What the answers that are not there yet will take."""
        [row] = self._database.read(
            "SELECT coalesce(sum(bytes), 0) AS n FROM work WHERE state IN ('pending', 'leased')"
        )
        return row["n"]

    def counts(self) -> dict[str, int]:
        """state -> answers in it."""
        return {
            row["state"]: row["n"]
            for row in self._database.read("SELECT state, count(*) AS n FROM work GROUP BY state")
        }

    def oldest_wait(self) -> float:
        """Seconds that the oldest answer has waited for a worker."""
        [row] = self._database.read(
            "SELECT min(enqueued) AS since FROM work WHERE state = 'pending' AND boot = ?", (clock.boot(),)
        )
        return 0.0 if row["since"] is None else max(0.0, clock.now() - row["since"])

    def totals(self) -> dict[str, float]:
        """What all workers have done: answers, tokens, bytes, wait_seconds."""
        return {row["name"]: row["value"] for row in self._database.read("SELECT name, value FROM totals")}

    def offers(self, alive_within: float | None = None) -> dict[str, Offer]:
        """model_key -> what its workers can compute. alive_within : only models with a sign of life in so many seconds."""
        since = 0.0 if alive_within is None else time.time() - alive_within
        rows = self._database.read("SELECT facts FROM models WHERE seen >= ?", (since,))
        return {offer.id: offer for offer in (Offer.from_json(json.loads(row["facts"])) for row in rows)}

    def workers(self) -> list[dict[str, Any]]:
        """Of each that runs: id, seconds since its last sign of life, answers that it holds, share of its ring in use."""
        rows = self._database.read(
            "SELECT workers.*, (SELECT count(*) FROM work WHERE worker = workers.id AND state = 'leased') AS holds FROM workers"
        )
        now = clock.now()
        return [
            {
                "id": row["id"],
                "silent": now - row["beat"],
                "holds": row["holds"],
                "ring": row["ring"],
            }
            for row in rows
            if clock.started(row["pid"]) == row["started"]
        ]

    def give_up(self, patience: float) -> int:
        """Fail what has waited so many seconds while no worker of its model lived. Returns how much."""
        now, boot = clock.now(), clock.boot()
        with self._database.write() as cursor:
            # After a boot everything begins to wait anew: workers take a while to start.
            cursor.execute(
                "UPDATE work SET boot = ?, enqueued = ? WHERE state = 'pending' AND boot != ?", (boot, now, boot)
            )
            cursor.execute(
                "UPDATE work SET state = 'failed', ids = NULL, cause = 'no worker of this model came to compute it'"
                " WHERE state = 'pending' AND enqueued < ? AND model NOT IN (SELECT id FROM models WHERE seen >= ?)",
                (now - patience, time.time() - patience),
            )
            return cursor.rowcount

    # What workers ask.

    def join(self, worker: str, offer: Offer) -> None:
        """A worker is there."""
        with self._database.write() as cursor:
            for row in cursor.execute("SELECT id, pid, started FROM workers").fetchall():
                if clock.started(row["pid"]) != row["started"]:
                    cursor.execute("DELETE FROM workers WHERE id = ?", (row["id"],))
            cursor.execute(
                "INSERT INTO workers (id, model, pid, started, beat) VALUES (?, ?, ?, ?, ?)",
                (worker, offer.id, os.getpid(), clock.started(), clock.now()),
            )
            cursor.execute(
                "INSERT INTO models (id, name, facts, seen) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET facts = excluded.facts, seen = excluded.seen",
                (offer.id, offer.name, json.dumps(offer.to_json()), time.time()),
            )

    def beat(self, worker: str, lease: float, ring: float) -> None:
        """A worker lives: its leases hold for so many seconds from now. ring : share of its ring that is in use."""
        with self._database.write() as cursor:
            cursor.execute("UPDATE workers SET beat = ?, ring = ? WHERE id = ?", (clock.now(), ring, worker))
            cursor.execute(
                "UPDATE models SET seen = ? WHERE id = (SELECT model FROM workers WHERE id = ?)", (time.time(), worker)
            )
            cursor.execute(
                "UPDATE work SET lease = ? WHERE worker = ? AND state = 'leased'", (clock.now() + lease, worker)
            )

    def leave(self, worker: str) -> None:
        """A worker ends, and has not died over what it holds: that is anybody's."""
        with self._database.write() as cursor:
            cursor.execute(
                "UPDATE work SET state = 'pending', attempts = attempts - 1, worker = NULL, lease = NULL"
                " WHERE worker = ? AND state = 'leased'",
                (worker,),
            )
            cursor.execute("DELETE FROM workers WHERE id = ?", (worker,))

    def oldest(self, model: str) -> Group | None:
        """The group of the oldest work that can be taken."""
        rows = self._database.read(
            "SELECT plan, tenant FROM work WHERE model = ? AND state = 'pending' ORDER BY number LIMIT 1", (model,)
        )
        return Group(rows[0]["plan"], rows[0]["tenant"]) if rows else None

    def plan(self, id: str) -> Plan:
        [row] = self._database.read("SELECT spec FROM plans WHERE id = ?", (id,))
        return Plan.from_json(json.loads(row["spec"]))

    def take(self, worker: str, model: str, group: Group, most: int, lease: float) -> list[Taken]:
        """Take a lease on up to so many answers, the oldest first."""
        with self._database.write() as cursor:
            rows = cursor.execute(
                "UPDATE work SET state = 'leased', worker = ?, lease = ?, boot = ?, attempts = attempts + 1 WHERE number IN"
                " (SELECT number FROM work WHERE model = ? AND plan = ? AND tenant = ? AND state = 'pending'"
                " ORDER BY number LIMIT ?) RETURNING number, key, ids, seed, bytes, attempts, enqueued",
                (worker, clock.now() + lease, clock.boot(), model, group.plan, group.tenant, most),
            ).fetchall()
            _count(cursor, wait_seconds=sum(max(0.0, clock.now() - row["enqueued"]) for row in rows))
        found = []
        # RETURNING gives rows in any order.
        for row in sorted(rows, key=lambda row: row["number"]):
            prompt, given = json.loads(row["ids"])
            wanted = Wanted(
                row["key"], tuple(prompt), None if given is None else tuple(given), row["seed"], row["bytes"]
            )
            found.append(Taken(row["number"], wanted, row["attempts"] - 1))
        return found

    def reclaim(self, attempts: int) -> int:
        """Make pending what was held by workers that have ended, or whose lease is over: those are ended first.

        attempts : what so many workers died over is failed instead.

        Returns how much.
        """
        rows = self._database.read(
            "SELECT worker, pid, started, min(lease) AS lease, min(work.boot) AS boot FROM work"
            " LEFT JOIN workers ON workers.id = worker WHERE state = 'leased' GROUP BY worker"
        )
        gone = []
        for row in rows:
            lives = row["pid"] is not None and clock.started(row["pid"]) == row["started"]
            over = row["lease"] < clock.now() or row["boot"] != clock.boot()
            # Who lives and has not said so for so long stands still, and must not go on.
            if not lives or (over and _end(row["pid"], row["started"])):
                gone.append(row["worker"])
        if not gone:
            return 0
        marks = ", ".join("?" * len(gone))
        with self._database.write() as cursor:
            cursor.execute(
                "UPDATE work SET state = CASE WHEN attempts >= ? THEN 'failed' ELSE 'pending' END,"
                " cause = CASE WHEN attempts >= ? THEN attempts || ' workers ended while they computed it' END,"
                " ids = CASE WHEN attempts >= ? THEN NULL ELSE ids END,"
                f" worker = NULL, lease = NULL WHERE state = 'leased' AND worker IN ({marks})",
                (attempts, attempts, attempts, *gone),
            )
            return cursor.rowcount

    def finish(
        self, worker: str, done: Sequence[tuple[Taken, str]], failed: Sequence[tuple[Taken, str]] = (), tokens: int = 0
    ) -> None:
        """Answers are committed: (work, capture), under their keys; or cannot be computed: (work, cause).

        tokens : that were computed for them.
        """
        with self._database.write() as cursor:
            for one, capture in done:
                key = one.wanted.key
                # It is there, whoever holds the lease by now.
                cursor.execute(
                    "UPDATE work SET state = 'done', ids = NULL, lease = NULL, cause = NULL, capture = ? WHERE number = ?",
                    (capture, one.number),
                )
                cursor.execute(
                    "INSERT OR IGNORE INTO entries (key, capture, sample) VALUES (?, ?, ?)", (key, capture, key)
                )
            for one, cause in failed:
                cursor.execute(
                    "UPDATE work SET state = 'failed', ids = NULL, lease = NULL, cause = ?"
                    " WHERE number = ? AND state = 'leased' AND worker = ?",
                    (cause, one.number, worker),
                )
            _count(cursor, answers=len(done), tokens=tokens, bytes=sum(one.wanted.bytes for one, _ in done))

    def give_back(self, worker: str, numbers: Sequence[int]) -> None:
        """Leases on work that cannot be done now."""
        with self._database.write() as cursor:
            for start in range(0, len(numbers), _AT_ONCE):
                part = numbers[start : start + _AT_ONCE]
                cursor.execute(
                    "UPDATE work SET state = 'pending', attempts = attempts - 1, worker = NULL, lease = NULL"
                    f" WHERE worker = ? AND state = 'leased' AND number IN ({', '.join('?' * len(part))})",
                    (worker, *part),
                )


def _count(cursor: sqlite3.Cursor, **more: float) -> None:
    cursor.executemany(
        "INSERT INTO totals (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, float(value)) for name, value in more.items() if value],
    )


def _end(pid: int | None, started: str | None) -> bool:
    """See to it that a process has ended, which is named by its number and its start. Returns whether it has."""
    if pid is None or clock.started(pid) != started:
        return True
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while clock.started(pid) == started:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
