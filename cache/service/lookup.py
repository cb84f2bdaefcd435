"""Lookup: which captures hold an answer. It follows from what is committed in the lake, and is kept in the database."""

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.identity import Sampling, answer_key, model_key
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.plans import TASK, Plan, covers
from hiddenlake.cache.store.commits import Commit, read_checked
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.tables import decode

# A miss looks again at what captures hold, but not more often than this.
_FRESH_SECONDS = 1.0

_AT_ONCE = 500


class Lookup:
    """Answers by their key. May be used from several threads."""

    def __init__(self, database: Database, lake: Lake) -> None:
        self._database, self._lake = database, lake
        self._lock = threading.Lock()
        self._looked = -_FRESH_SECONDS

    def find(self, keys: Sequence[str], plan: Plan, caller: Caller) -> dict[str, tuple[str, str]]:
        """key -> (capture, key of the sample in it), of those answers that a capture covering the plan holds.

        Of several captures the one that was known first is named: the same whenever it is asked for.
        """
        found = self._find(keys, plan, caller)
        if len(found) < len(keys):
            self._refresh()
            found |= self._find([key for key in keys if key not in found], plan, caller)
        return found

    def _find(self, keys: Sequence[str], plan: Plan, caller: Caller) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        usable: dict[str, bool] = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            rows = self._database.read(
                f"SELECT key, capture, sample FROM entries WHERE key IN ({marks}) ORDER BY number", part
            )
            for key, capture, sample in rows:
                if key in found:
                    continue
                if capture not in usable:
                    usable[capture] = self._usable(capture, plan, caller)
                if usable[capture]:
                    found[key] = capture, sample
        return found

    def _usable(self, name: str, plan: Plan, caller: Caller) -> bool:
        try:
            return covers(self._lake.capture(name, caller).coverage, plan)
        except HiddenlakeError:
            return False

    def _refresh(self) -> None:
        """Read what was committed since."""
        with self._lock:
            if time.monotonic() - self._looked >= _FRESH_SECONDS:
                self.refresh()
                self._looked = time.monotonic()

    def refresh(self) -> None:
        """Bring the database up to what captures hold now, and forget captures that are gone."""
        there = dict(self._lake.all())
        parts: dict[str, set[str]] = {}
        for row in self._database.read("SELECT capture, part FROM indexed"):
            parts.setdefault(row["capture"], set()).add(row["part"])
        for name in parts.keys() - there.keys():
            self._forget(name)
        for name, capture in there.items():
            commits = {_part(commit): commit for commit in capture.commits}
            known = parts.get(name, set())
            if known - commits.keys():  # compacted, or another capture of that name
                self._forget(name)
                known = set()
            new = commits.keys() - known
            # Which captures there are was seen a moment ago. Who purges one clears the database once it is removed.
            if not new or not _is_there(capture):
                continue
            for part in new:
                self._add(name, capture, part, commits[part])
            if not _is_there(capture):
                self._forget(name)

    def _add(self, name: str, capture: Capture, part: str, commit: Commit) -> None:
        try:
            rows = list(_keys(capture, commit)) if commit.files else []
        except HiddenlakeError:  # reading it says so; it holds nothing that could be found
            rows = []
        with self._database.write() as cursor:
            cursor.executemany(
                "INSERT OR IGNORE INTO entries (key, capture, sample) VALUES (?, ?, ?)",
                [(key, name, sample) for key, sample in rows],
            )
            cursor.execute("INSERT OR IGNORE INTO indexed (capture, part) VALUES (?, ?)", (name, part))

    def _forget(self, name: str) -> None:
        with self._database.write() as cursor:
            cursor.execute("DELETE FROM entries WHERE capture = ?", (name,))
            cursor.execute("DELETE FROM indexed WHERE capture = ?", (name,))


def _is_there(capture: Capture) -> bool:
    try:
        capture.snapshot.check_there()
    except StoreError:
        return False
    return True


def _part(commit: Commit) -> str:
    """Names a commit among all that ever stood in its place."""
    return f"{commit.shard}/{commit.writer}/{commit.fencing}/{commit.time}"


def _keys(capture: Capture, commit: Commit) -> Iterator[tuple[str, str]]:
    """(answer's key, sample's key) of a commit's samples, where the capture says how its answers came about."""
    identity, layout = capture.identity, capture.snapshot.layout
    decoding = identity.get("decoding")
    if not isinstance(decoding, dict) or "sampling" not in decoding:
        return
    if identity.get("task") == TASK:  # its samples are answers, and have their keys
        yield from ((key, key) for key in commit.keys if key is not None)
        return
    name = layout.samples_file(commit.shard)
    columns = ["key", "index", "sample_index", "token_ids", "prompt_length"]
    table = decode(
        read_checked(capture.place, name, commit.files[name], [commit.shard]), f"{capture.path}/{name}", columns
    )
    sampling = decoding["sampling"]
    seeded = (
        Sampling(seed=sampling["seed"], temperature=1.0) if isinstance(sampling, dict) and "seed" in sampling else None
    )
    given = sampling == "given"
    model = model_key(identity)
    rows = zip(*(table[column].to_pylist() for column in columns if column != "token_ids"), strict=True)
    for number, (sample, index, sample_index, prompt_length) in enumerate(rows):
        ids = np.asarray(table["token_ids"][number].values)
        seed = None if seeded is None else seeded.seed_of(index, sample_index)
        key = answer_key(model, decoding, ids[:prompt_length], ids[prompt_length:] if given else None, seed)
        if key is not None:
            yield key, sample
