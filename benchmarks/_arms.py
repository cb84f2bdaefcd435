"""Arms: what is compared, each in a child process that lives as long as its rounds. See arms/serve.py for its side."""

import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCRIPTS = Path(__file__).parent / "arms"

# One thread everywhere, so that seconds of CPU compare: waiting OpenMP threads spin, and are counted.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# A round takes seconds and a start a minute, on a busy machine a few: what takes longer hangs.
_SECONDS = 900


class ArmError(RuntimeError):
    """An arm that did not start, or ended, or captured something else than it should."""

    def __init__(self, arm: "Arm", what: str) -> None:
        super().__init__(f"{arm.name} {what}")
        self.arm = arm


class Arm:
    """One child process.

    python : of the environment that it runs in.  script : in arms/.  spec : JSON, its first line.
    log : file for what it prints.  variables : of its environment, where they differ from ENVIRONMENT; None for unset.
    """

    def __init__(
        self,
        name: str,
        python: str | Path,
        script: str,
        spec: dict[str, Any],
        log: Path,
        variables: Mapping[str, str | None] | None = None,
    ) -> None:
        self.name, self._log = name, log
        self._ready = self._closed = False
        # answers have a pipe of their own, since libraries print to stdout
        read, write = os.pipe()
        self._answers = os.fdopen(read)
        environment = {**os.environ, **ENVIRONMENT, **(variables or {})}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [str(python), str(SCRIPTS / script), str(write)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
                env={name: value for name, value in environment.items() if value is not None},
                pass_fds=[write],
                start_new_session=True,  # its children end with it
            )
        os.close(write)
        self._send(spec)

    def wait_until_ready(self) -> None:
        if not self._ready:
            self._ready = self._answer()["ready"]

    def ask(self, round: dict[str, Any]) -> dict[str, Any]:
        """Run one round. Raises ArmError."""
        self._send(round)
        return self._answer()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._error("ended") from None

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            # not end of file alone: an engine that outlives its driver holds the pipe too
            while not selector.select(1):
                if self._process.poll() is not None:
                    raise self._error("ended")
                if time.monotonic() > deadline:
                    raise self._error(f"did not answer in {_SECONDS} s")
        line = self._answers.readline()
        if not line:
            raise self._error("ended")
        return json.loads(line)

    def _error(self, what: str) -> ArmError:
        # the first line that looks like the end of a traceback: engines go on to print what followed from it
        cause = re.search(r"\b[\w.]*(?:Error|Exception): .+", self._log.read_text(errors="replace"))
        return ArmError(self, f"{what}: {cause[0] if cause else 'it left no cause'}")

    def log_tail(self) -> str:
        """The end of what it printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-60:])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._answers.close()


def in_rotation(cases: Sequence[T], round: int) -> list[T]:
    """Nobody is always first."""
    at = round % len(cases)
    return [*cases[at:], *cases[:at]]
