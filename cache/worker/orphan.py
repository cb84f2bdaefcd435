"""An engine process must not outlive a driver that was killed: it would hold the device and wait for ever."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def exit_with_driver() -> None:
    """End vLLM's engine process, and with it its workers, when the driver is gone. Does nothing elsewhere."""
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # nothing here is worth saving: what is not committed is captured again

    threading.Thread(target=watch, name="hiddenlake-orphan", daemon=True).start()
