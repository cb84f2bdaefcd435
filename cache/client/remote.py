"""A capture behind a service, with the interface of one that is open on disk."""

import json
from typing import TYPE_CHECKING, Any

from hiddenlake.cache.client.asking import Ask, Steps, ask_plainly
from hiddenlake.cache.client.connection import Connection
from hiddenlake.cache.client.moment import RemoteMoment, ask_moment, read_parquet
from hiddenlake.cache.client.paths import CAPTURES, capture_path, label_path
from hiddenlake.cache.store.readable import Readable

if TYPE_CHECKING:
    import pyarrow


class RemoteCapture(Readable):
    """One capture, made by `RemoteLake.capture`. It shows what was committed when it was opened or refreshed.

    What has grown since can still be read as it was; what was removed, compacted or captured again gives a StoreError. May
    be used from several threads.
    """

    snapshot: RemoteMoment

    def __init__(self, moment: RemoteMoment) -> None:
        self.snapshot = moment

    @property
    def path(self) -> str:
        """The URL."""
        return str(self.snapshot)

    @property
    def connection(self) -> Connection:
        return self.snapshot.connection

    def refresh(self) -> None:
        """Show what was committed since. Raises StoreError where the capture is gone."""
        self.snapshot = self.connection.run(ask_moment(self.connection, self.snapshot.capture))

    def labels(self) -> dict[str, "pyarrow.Table"]:
        """Tables of labels that were added later, by name: a column `key`, and values."""
        return self.connection.run(ask_labels(self.connection.url, self.snapshot.capture))


def ask_captures() -> Steps:
    """What captures there are: see `Lake.captures`."""
    found = json.loads((yield from ask_plainly(Ask("GET", CAPTURES))))
    return [_entry(entry) for entry in found["captures"]]


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    error = entry.pop("error")
    return entry if error is None else {"name": entry["name"], "error": error}


def ask_labels(url: str, capture: str) -> Steps:
    """name -> table, of all labels that were added to a capture."""
    facts = json.loads((yield from ask_plainly(Ask("GET", capture_path(capture)))))
    found = {}
    for name in facts["labels"]:
        path = label_path(capture, name)
        found[name] = read_parquet((yield from ask_plainly(Ask("GET", path))), f"{url}{path}")
    return found
