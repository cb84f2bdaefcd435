"""Storing: the thread that moves finished samples' rows from the ring into the shards, while the model goes on."""

import queue
import threading
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

from hiddenlake.cache.filling import fill
from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.plan import Placement
from hiddenlake.cache.worker.recorder import Recorder


class Storing:
    """Takes placements from the driver and reports, for each, None or why it could not be stored.

    The rows are copied once, out of the ring and straight to their place in the shard.
    """

    def __init__(self, recorder: Recorder, table: TapTable) -> None:
        self.recorder, self.table = recorder, table
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._submitted = self._reported = 0
        # while it waits, the thread holds nothing that would keep the ring of a closed engine in this process alive
        threading.Thread(target=_work, args=(self._jobs, self._done), name="hiddenlake-storing", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> None:
        """Start to store. Nothing of these samples is recorded any more."""
        for placement in placements:
            if book := self.recorder.books.get(placement.key):
                book.storing = True
        self._submitted += len(placements)
        mark = self.recorder.staging.mark()
        for placement in placements:
            self._jobs.put((self._store, mark, handles, placement))

    def done(self, wait: bool) -> list[tuple[str, str | None]]:
        """(key, cause or None) of what has been stored since the last call; of all that was submitted, if asked to wait.

        A sample whose placement was its last is forgotten: its rows are free again.
        """
        found = []
        while self._reported < self._submitted and (wait or not self._done.empty()):
            key, cause, last = self._done.get()
            self._reported += 1
            if last or cause is not None:
                self.recorder.drop(key)
            found.append((key, cause))
        return found

    def _store(self, mark: Any, handles: Sequence[dict[str, Any]], placement: Placement) -> str | None:
        recorder, key = self.recorder, placement.key
        recorder.staging.wait(mark)
        book = recorder.books.get(key)
        pool = None if book is None else book.pool
        return fill(self.table, placement, handles, lambda tokens: recorder.rows(key, tokens), pool, recorder.check)


def _work(jobs: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        store, *arguments, placement = job
        try:
            cause = store(*arguments, placement)
        except Exception:  # noqa: BLE001 - the sample's cause
            cause = f"storing failed in the worker: {traceback.format_exc(limit=3)}"
        done.put((placement.key, cause, placement.done))
        del job, store
