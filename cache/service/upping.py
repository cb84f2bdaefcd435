"""Both on one machine: a server, and beside it a worker that is started again when it dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from hiddenlake.cache.service.logs import event

# After a worker that has died at once, so that one that cannot start does not take the machine.
_PAUSES = (1.0, 5.0, 15.0, 60.0)

# A worker that has lived so long has not died at once.
_SETTLED_SECONDS = 60.0


# The worker command's own word for `end_with_parent`.
WITH_PARENT = "--with-parent"


def end_with_parent() -> None:
    """Have this process end as by SIGTERM once the one that started it is gone, however that ended: its stdin is closed then."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class WorkerProcess:
    """`hiddenlake worker` in a process of its own, from `start` to `stop`. It does not outlive this one.

    arguments : of the command.  drain : seconds that it has to end.
    """

    def __init__(self, arguments: Sequence[str], drain: float) -> None:
        self._command = [sys.executable, "-m", "hiddenlake.cli", "worker", WITH_PARENT, *arguments]
        self._drain = drain
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Tell it to end; what is in flight is finished. It is killed when it takes too long."""
        self._ended.set()
        with self._lock:
            process = self._process
            if process is not None:
                process.terminate()
        if process is not None:
            try:
                process.wait(self._drain)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join()

    def _run(self) -> None:
        failures = 0
        while not self._ended.is_set():
            start = time.monotonic()
            with self._lock:
                if self._ended.is_set():
                    return
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
            status = self._process.wait()
            if self._ended.is_set():
                return
            failures = 0 if time.monotonic() - start > _SETTLED_SECONDS else failures + 1
            pause = _PAUSES[min(failures, len(_PAUSES)) - 1] if failures else 0.0
            event("worker ended", status=status, again_in=pause)
            self._ended.wait(pause)
