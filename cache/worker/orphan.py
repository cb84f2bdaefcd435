"""No process of vLLM may outlive the one that started it: it would hold the device and wait for ever."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import threading

# As vLLM names its engine's process and those of its workers.
_NAMES = ("EngineCore", "VllmWorker")


@functools.cache
def exit_with_parent() -> None:
    """End this process, if it is one of vLLM's, when the one that started it is gone.

    Workers that compute together wait for each other without looking up, so that vLLM's own watch does not end them.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(_NAMES):
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # nothing here is worth saving: what is not committed is captured again

    threading.Thread(target=watch, name="hiddenlake-orphan", daemon=True).start()
