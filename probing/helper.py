"""Helper: a process that works on the cells of another one's grid, through the same checkpoint.

Threads do not do for narrow cells: their matrix products are so short that Python's lock is what they wait for. (Cells of
1,000 x 576 on two cores: two threads took as long as one, two processes half of it.)
"""

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np


class Helper:
    """A running helper. It ends with the block that it is started for, and with this process, however that ends."""

    def __init__(self, capture: str, site: str, checkpoint: Path, arguments: dict[str, Any]) -> None:
        weight = arguments.get("class_weight")
        if isinstance(weight, Mapping):  # JSON's keys are text, these are bool
            arguments = arguments | {"class_weight": list(weight.items())}
        request = json.dumps([capture, site, str(checkpoint), arguments], default=_plain)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hiddenlake.probing.helper"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        with suppress(BrokenPipeError):  # it has ended already, which is said at the end
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        ended = self._process.poll()
        self._process.terminate()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        if kind is None and ended:
            warnings.warn(
                f"a process that helped with the grid ended with status {ended}: its cells were fitted without it",
                RuntimeWarning,
                stacklevel=2,
            )


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers and arrays, ranges and sets."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else list(value)


def main() -> None:
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.grid import fit_grid

    capture, site, checkpoint, arguments = json.loads(sys.stdin.buffer.readline())
    if isinstance(arguments.get("class_weight"), list):
        arguments["class_weight"] = {bool(key): weight for key, weight in arguments["class_weight"]}

    def end_with_parent() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock a thread that waits would hold at the interpreter's end
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        fit_grid(open_capture(capture), site, checkpoint=checkpoint, **arguments)
    except KeyboardInterrupt:  # said by who is helped
        sys.exit(130)


if __name__ == "__main__":
    main()
