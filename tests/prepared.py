"""Processes that need not import what takes longest, 5 s for transformers and 9 s for vLLM: forks of one that has done so once."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

# What engines need, beside what was there when tests began: some of it is read as libraries are imported.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, which are written at each start
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Of what processes say: two that begin in one folder at once have files of their own.
_NUMBERS = itertools.count()

COMMAND = "from hiddenlake.cli import main; main()"

# Forks for each line that comes in, and says how each child ended. A child leaves the loop, and ends as any process does.
# Where vLLM is not installed, no test asks for it; where it is and does not import, each that does will say so.
_SERVER = """
import contextlib, gc, json, os, select, sys
import hiddenlake.cache.capture, hiddenlake.cli
from transformers import AutoModelForCausalLM, AutoTokenizer
with contextlib.suppress(ImportError):
    from vllm.v1.engine.llm_engine import LLMEngine
    import vllm.v1.worker.cpu_worker
gc.freeze()
print("ready", flush=True)
while True:
    if select.select([0], [], [], 0.02)[0]:
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        child = os.fork()
        if not child:
            break
        print(json.dumps([child, None]), flush=True)
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            print(json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]), flush=True)
order = json.loads(line)
os.setsid()
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
for number, name in ((1, order["out"]), (2, order["err"])):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
os.environ.clear()
os.environ.update(order["environment"])
os.chdir(order["folder"])
sys.argv = ["-c", *order["arguments"]]
sys.path.insert(0, "")
exec(compile(order["script"], "<script>", "exec"), {"__name__": "__main__"})
"""


class Process:
    """A child of the server: as `subprocess.Popen`, in a session of its own. out, err : what it has said."""

    def __init__(self, server: "_Server", pid: int, out: Path, err: Path) -> None:
        self._server, self.pid, self._out, self._err = server, pid, out, err

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def poll(self) -> int | None:
        return self._server.ended.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        with self._server.news:
            if not self._server.news.wait_for(lambda: self.pid in self._server.ended, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._server.ended[self.pid]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ended: dict[int, int] = {}
        self.news = threading.Condition()
        self._order, self._began = threading.Lock(), 0
        while (said := self._process.stdout.readline()) != "ready\n":
            assert said, "what is prepared could not be imported"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            pid, status = json.loads(line)
            with self.news:
                if status is None:
                    self.ended.pop(pid, None)  # of an earlier process of this number
                    self._began = pid
                else:
                    self.ended[pid] = status
                self.news.notify_all()

    def start(self, **order: object) -> int:
        with self._order:
            self._began = 0
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            with self.news:
                assert self.news.wait_for(lambda: self._began, 60)
            return self._began


@functools.cache
def _server(pid: int) -> _Server:
    """One for each process that asks."""
    return _Server()


def start(
    said: Path, *arguments: object, script: str = COMMAND, folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:  # fmt: skip
    """Begin a script, by default the `hiddenlake` command, in a process of its own.

    said : a folder for what it says, or a file to which that is added.  folder : is worked in.
    environment : beside ENVIRONMENT; what a test has set in its own process is not there.
    """
    server = _server(os.getpid())
    files = (said, said)
    if said.is_dir():
        number = next(_NUMBERS)
        files = (said / f".said-{number}.out", said / f".said-{number}.err")
    for file in files:
        file.touch()
    pid = server.start(
        script=script, arguments=[str(argument) for argument in arguments], folder=str(folder or Path.cwd()),
        out=str(files[0]), err=str(files[1]), environment=ENVIRONMENT | dict(environment or {}),
    )  # fmt: skip
    return Process(server, pid, *files)
