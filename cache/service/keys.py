"""Keys: who may ask. Only digests are kept, and a key is shown once, when it is made."""

import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.service.database import Database

# Each includes those before it.
SCOPES = ("read", "compute", "admin")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_START = "hl_"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    id : of the key, which is no secret.  scopes : some of SCOPES.
    tenant : whose captures it sees beside those that are everybody's; None for no tenant's.
    """

    id: str
    name: str
    scopes: frozenset[str]
    tenant: str | None = None

    def may(self, scope: str) -> bool:
        return scope in self.scopes


class Keys:
    """The keys of one lake. May be used from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._version: Any = None
        self._known: list[tuple[bytes, Caller]] = []
        self._temporary: list[tuple[bytes, Caller]] = []

    def add(self, name: str, scope: str = "read", tenant: str | None = None) -> str:
        """Make a key. Returns it: it cannot be had again.

        scope : one of SCOPES; the ones before it are included.
        tenant : a name; what is computed with this key is seen by this tenant's keys alone.

        Raises BadInputError.
        """
        for what, value in (("name", name), ("tenant", tenant)):
            if value is not None and not _NAME.fullmatch(value):
                raise BadInputError(f"{what} {value!r}: expected up to 64 letters, digits, dots, hyphens, _ and @")
        if scope not in SCOPES:
            raise BadInputError(f"scope {scope!r} does not exist: expected one of {', '.join(SCOPES)}")
        key, id = _make(), secrets.token_hex(4)
        with self._database.write() as cursor:
            cursor.execute(
                "INSERT INTO keys (id, name, hash, scopes, tenant, created) VALUES (?, ?, ?, ?, ?, ?)",
                (id, name, _digest(key), ",".join(_including(scope)), tenant, time.time()),
            )
        self._version = None  # a connection does not see its own writes as another version
        return key

    def add_temporary(self) -> str:
        """A key for all, which ends with this process and is not kept."""
        key = _make()
        self._temporary.append((_digest(key), Caller("temporary", "temporary", frozenset(SCOPES))))
        return key

    def list(self) -> list[dict[str, Any]]:
        """Of all that were made: id, name, scopes, tenant, created and revoked (seconds since 1970)."""
        rows = self._database.read("SELECT id, name, scopes, tenant, created, revoked FROM keys ORDER BY created")
        return [dict(row) | {"scopes": row["scopes"].split(",")} for row in rows]

    def revoke(self, id: str) -> None:
        """Have a key mean nothing, at once. Raises BadInputError where there is none of this id."""
        with self._database.write() as cursor:
            cursor.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), id))
            if cursor.rowcount != 1:
                raise BadInputError(f"no key has the id {id!r}, or it was revoked: `hiddenlake keys ls` lists them")
        self._version = None

    def any(self) -> bool:
        """Whether there is a key that was added and not revoked."""
        return any(row["revoked"] is None for row in self.list())

    def caller(self, key: str | None) -> Caller | None:
        """Whose key it is, or None. How long it takes says nothing about the keys there are."""
        digest, found = _digest(key or ""), None
        for known, caller in [*self._current(), *self._temporary]:
            if secrets.compare_digest(known, digest):
                found = caller
        return found

    def _current(self) -> Sequence[tuple[bytes, Caller]]:
        with self._lock:
            version = self._database.version
            if version != self._version:
                rows = self._database.read("SELECT id, name, hash, scopes, tenant FROM keys WHERE revoked IS NULL")
                self._known = [
                    (row["hash"], Caller(row["id"], row["name"], frozenset(row["scopes"].split(",")), row["tenant"]))
                    for row in rows
                ]
                self._version = version
            return self._known


def _make() -> str:
    return _START + secrets.token_urlsafe(32)


def _digest(key: str) -> bytes:
    # A key has 256 random bits: nothing is gained by hashing it slowly.
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def _including(scope: str) -> tuple[str, ...]:
    return SCOPES[: SCOPES.index(scope) + 1]
