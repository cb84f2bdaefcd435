"""Workers: the verbs of an engine's workers, shared by the captures that are stored from it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from hiddenlake.cache.engines.ranks import Ranks
from hiddenlake.cache.shelf import Stored
from hiddenlake.cache.worker.plan import Placement

# A sample is copied in a millisecond or so. The worker is asked and never made to wait, since the model waits with it.
_POLL_SECONDS = 0.005


class Workers:
    """One engine's workers.

    call : calls a verb of CaptureExtension with these arguments. Returns each rank's answer.
    """

    def __init__(self, call: Callable[..., list[Any]], ranks: int) -> None:
        self.call = call
        self._ranks = Ranks(ranks)
        self._ports: dict[str, Port] = {}

    def port(self) -> "Port":
        """One writer's door to the workers."""
        return Port(self)

    def send(self, port: "Port", handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> None:
        """Start to store. What was stored meanwhile is delivered to whom it belongs."""
        for placement in placements:
            self._ports[placement.key] = port
        self._deliver(self.call("hiddenlake_store", list(handles), [placement.to_json() for placement in placements]))

    def poll(self) -> None:
        """Deliver what was stored since."""
        if self._ports:
            self._deliver(self.call("hiddenlake_stored", False))

    def drop(self, keys: Sequence[str]) -> None:
        """Forget samples: their rows are free again. Nobody hears of them any more."""
        for key in keys:
            self._ports.pop(key, None)
        self.call("hiddenlake_drop", list(keys))

    def _deliver(self, found: list[list[Stored]]) -> None:
        for key, cause in self._ranks.merge(found):
            if port := self._ports.pop(key, None):
                port.inbox.append((key, cause))


class Port:
    """What a shelf needs of an engine, for one writer among several."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._sent: set[str] = set()
        self.inbox: list[Stored] = []

    def store(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> list[Stored]:
        if placements:
            self._sent.update(placement.key for placement in placements)
            self._workers.send(self, handles, placements)
        return self._taken()

    def stored(self, wait: bool) -> list[Stored]:
        self._workers.poll()
        while wait and self._sent - {key for key, _ in self.inbox}:
            time.sleep(_POLL_SECONDS)
            self._workers.poll()
        return self._taken()

    def _taken(self) -> list[Stored]:
        taken, self.inbox = self.inbox, []
        self._sent.difference_update(key for key, _ in taken)
        return taken
