"""Database: one SQLite file beside the captures, for keys, jobs and leases. Several processes use it at once."""

import itertools
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import StoreError

# Counted up with every change of the tables; there is no older one yet.
VERSION = 1

FOLDER = ".hiddenlake"
FILE = "service.sqlite"

# A writer waits for another one's transaction, which are all short.
_BUSY_SECONDS = 30.0

_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL, scopes TEXT NOT NULL, tenant TEXT,
    created REAL NOT NULL, revoked REAL
) STRICT;

-- What workers can compute. facts: JSON of Offer.
CREATE TABLE models (id TEXT PRIMARY KEY, name TEXT NOT NULL, facts TEXT NOT NULL, seen REAL NOT NULL) STRICT;

-- started: what tells a process from a later one of its number.
CREATE TABLE workers (
    id TEXT PRIMARY KEY, model TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL, beat REAL NOT NULL,
    ring REAL NOT NULL DEFAULT 0
) STRICT;

-- What all workers have done since the database was made.
CREATE TABLE totals (name TEXT PRIMARY KEY, value REAL NOT NULL) STRICT;

-- One row an answer that was asked for and was not there. ids: JSON, removed when it is there.
-- lease, enqueued: seconds of the machine's monotonic clock since the boot that `boot` names.
CREATE TABLE work (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, plan TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
    ids TEXT, seed INTEGER, bytes INTEGER NOT NULL, state TEXT NOT NULL, boot TEXT NOT NULL, enqueued REAL NOT NULL,
    worker TEXT, lease REAL, attempts INTEGER NOT NULL DEFAULT 0, capture TEXT, cause TEXT,
    UNIQUE (key, plan, tenant)
) STRICT;
CREATE INDEX work_state ON work (state, model, number);

-- How a group of answers is computed. spec: JSON of Plan.
CREATE TABLE plans (id TEXT PRIMARY KEY, spec TEXT NOT NULL) STRICT;

CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, tenant TEXT NOT NULL, created REAL NOT NULL, cancelled REAL
) STRICT;
CREATE TABLE items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, work INTEGER NOT NULL, PRIMARY KEY (job, work)
) STRICT, WITHOUT ROWID;
CREATE INDEX items_work ON items (work);

-- Where answers lie, whoever captured them; follows from the lake.
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, capture TEXT NOT NULL, sample TEXT NOT NULL, UNIQUE (key, capture)
) STRICT;
CREATE INDEX entries_capture ON entries (capture);
CREATE TABLE indexed (capture TEXT NOT NULL, part TEXT NOT NULL, PRIMARY KEY (capture, part)) STRICT, WITHOUT ROWID;

CREATE TABLE held (capture TEXT PRIMARY KEY, pinned INTEGER NOT NULL DEFAULT 0, used REAL NOT NULL) STRICT;
"""


class Database:
    """A lake's database; made if absent. May be used from several threads: each has a connection of its own.

    path : of the file. It and its folder are the user's own: 0600 and 0700.
    """

    def __init__(self, lake: str | Path) -> None:
        if "://" in str(lake):
            raise StoreError(f"{lake}: a service's database needs a local folder: serve a lake on a local disk")
        folder = Path(lake) / FOLDER
        self.path = folder / FILE
        self._local = threading.local()
        self._count = itertools.count()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # SQLite gives its other files the same mode.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
            folder.chmod(0o700)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}: name a lake whose folder can be written") from error
        self._make()

    def _make(self) -> None:
        try:
            with self.write() as cursor:
                [version] = cursor.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";\n"):
                        cursor.execute(statement)
                    cursor.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{self.path} cannot be used ({error}): stop all servers and workers of this lake and move it away; "
                f"captures stay as they are, keys and jobs are made anew"
            ) from error
        if version not in (0, VERSION):
            raise StoreError(f"{self.path} is of version {version}: this hiddenlake reads version {VERSION}; update it")

    @property
    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")  # what is deleted may be a prompt
            self._local.connection, self._local.number = connection, next(self._count)
        return connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Cursor]:
        """One transaction, alone among all processes; undone if the block raises."""
        connection = self._connection
        cursor = connection.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def read(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        return self._connection.execute(query, values).fetchall()

    @property
    def version(self) -> tuple[int, int]:
        """What is other once another connection than this thread's has written."""
        connection = self._connection
        # Numbers of two connections cannot be compared.
        return self._local.number, connection.execute("PRAGMA data_version").fetchone()[0]

    def tidy(self) -> None:
        """Have nothing that was deleted left in the write-ahead log. Does what it can while others read."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def vacuum(self) -> None:
        """Have nothing that was deleted left in any of its files. Does what it can while others read."""
        self._connection.execute("VACUUM")
        self.tidy()

    def close(self) -> None:
        """This thread's connection."""
        if connection := getattr(self._local, "connection", None):
            connection.close()
            self._local.connection = None
