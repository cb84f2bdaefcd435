"""Keeping: what a server does beside answering: dead workers' leases end, what nobody computes fails, the quota holds."""

import logging
import threading
import time

from hiddenlake.cache.service.app import Parts
from hiddenlake.cache.service.logs import event, logger

_SECONDS = 1.0

# Prompts that were computed are out of the database's files after this.
_TIDY_SECONDS = 30.0


class Keeper:
    """A thread, from `start` to `stop`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        tidied = time.monotonic()
        while not self._ended.wait(_SECONDS):
            try:
                self.keep()
                if time.monotonic() - tidied > _TIDY_SECONDS:
                    self._parts.database.tidy()
                    tidied = time.monotonic()
            except Exception:  # what fails now is tried again; the server goes on answering
                logger.exception("keeping failed")
        self._parts.database.close()

    def keep(self) -> None:
        """Once."""
        parts = self._parts
        if n := parts.work.reclaim(parts.settings.attempts):
            event("leases over", logging.WARNING, answers=n)
        if n := parts.work.give_up(parts.settings.patience):
            event("given up", logging.WARNING, answers=n)
        if parts.settings.quota is not None:
            for name in parts.holdings.evict(parts.settings.quota):
                parts.metrics.evictions.inc()
                event("evicted", capture=name)
