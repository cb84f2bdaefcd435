"""A served lake and nginx beside it, and wrk in front of both."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_writer

# What wrk's own table rounds is printed whole, as JSON.
_REPORT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('JSON{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "errors": %d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""

_NGINX = """
worker_processes auto;
pid {folder}/{name}.pid;
error_log {folder}/{name}.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  server {{ listen 127.0.0.1:{port}; root {folder}/www; }}
}}
"""

PROMPT_TOKENS, ANSWER_TOKENS = 24, 8


def need_programs() -> None:
    """Exits with a sentence where Debian's packages are missing."""
    if missing := [name for name in ("wrk", "nginx") if shutil.which(name) is None]:
        sys.exit(f"{' and '.join(missing)} not found: apt-get install wrk nginx-light")


def write_capture(folder: Path, samples: int, hidden: int, seed: int = 0) -> list[list[int]]:
    """A capture of 4 layers x 2 positions, bfloat16, as of greedy answers. Returns the prompts' token ids."""
    coverage = Coverage(("mlp_out",), tuple(range(4)), ("last_q", "-1"), {"mlp_out": hidden}, "bfloat16")
    identity = {
        "model": "bench", "weights": "sha256:bench", "quantization": None, "lora": None, "compute_dtype": "bfloat16",
        "stored_dtype": "bfloat16", "chat_template": None, "position_rules": 1, "task": "bench", "judge": "none",
        "decoding": {"max_new_tokens": ANSWER_TOKENS, "sampling": "greedy"},
    }  # fmt: skip
    random = np.random.default_rng(seed)
    prompts = random.integers(0, 30000, (samples, PROMPT_TOKENS)).tolist()
    keys = [f"{i:032x}" for i in range(samples)]
    with open_writer(folder, identity=identity, coverage=coverage, provenance={}, planned=samples) as writer:
        writer.reserve(keys, samples)
        for i, key in enumerate(keys):
            shard, slot = writer.slot()
            for view in shard.views.values():
                cells = view[..., slot, :]
                cells[...] = random.integers(0x3F00, 0x3FFF, cells.shape, dtype=np.uint16)
            ids = (*prompts[i], *range(ANSWER_TOKENS))
            last = len(ids) - 1
            writer.add(shard, slot, Sample(
                key, i, 0, "g", "prompt", "answer", (), True, None, False, ids, (-0.5,) * ANSWER_TOKENS, PROMPT_TOKENS,
                len(ids), "stop", (PROMPT_TOKENS - 1, last),
            ))  # fmt: skip
    return prompts


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "hiddenlake.cli", *map(str, arguments)]


@dataclass
class Process:
    """A program of ours that runs until the block ends. url : of a server."""

    process: subprocess.Popen
    url: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(lake: Path, *options: str) -> tuple[Process, str]:
    """(a server of ours, a key of scope admin)."""
    key = subprocess.run(
        command("keys", "add", lake, "bench", "--scope", "admin"), check=True, capture_output=True, text=True
    ).stdout.strip()
    port = free_port()
    log = (lake.parent / "server.log").open("wb")
    process = subprocess.Popen(
        command("serve", lake, "--port", str(port), "--log-level", "warning", *options), stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    _wait_for(f"{url}/healthz", process)
    return Process(process, url), key


def compute(lake: Path, model: Path, *options: str) -> Process:
    """A worker that is ready, of vLLM. Raises RuntimeError with the end of its log."""
    defaults = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = defaults | {"HF_HUB_OFFLINE": "1"} | os.environ
    log = lake.parent / "worker.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command("worker", lake, "--model", model, *options), stdout=file, stderr=file, env=environment
        )
    end = time.monotonic() + 300
    while b"is ready" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.2)
    return Process(process)


def nginx(folder: Path, congestion: str | None = None) -> Process:
    """The files of folder/www, as nginx serves them.

    congestion : the TCP congestion control of what it sends, for which it has no setting: it is given a socket that listens.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if congestion is not None:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        listening.bind(("127.0.0.1", 0))
        listening.listen(511)
        port, number = listening.getsockname()[1], listening.fileno()
        name = f"nginx-{port}"
        (folder / f"{name}.conf").write_text(_NGINX.format(folder=folder, port=port, name=name))
        process = subprocess.Popen(
            ["nginx", "-c", str(folder / f"{name}.conf"), "-g", "daemon off;"], stderr=subprocess.DEVNULL,
            env=os.environ | {"NGINX": f"{number};"}, pass_fds=[number],
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    _wait_for(f"{url}/{next((folder / 'www').iterdir()).name}", process)
    return Process(process, url)


def _wait_for(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{url} never answered") from None
            time.sleep(0.05)


@dataclass(frozen=True)
class Load:
    """What wrk saw. rate : requests a second.  p50, p99 : milliseconds."""

    rate: float
    p50: float
    p99: float


def wrk(
    url: str, clients: int, seconds: float, key: str | None = None, script: str = "", folder: Path | None = None
) -> Load:
    """Raises RuntimeError if any request failed."""
    file = (folder or Path("/tmp")) / f"wrk-{os.getpid()}.lua"
    file.write_text('wrk.headers["Content-Type"] = "application/json"\n' + script + _REPORT)
    headers = ["-H", f"Authorization: Bearer {key}"] if key else []
    done = subprocess.run(
        ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", *headers, "-s", str(file), url],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    file.unlink()
    found = json.loads(re.search(r"JSON(.*)", done.stdout)[1])
    if found["errors"]:
        raise RuntimeError(f"{url}: {found['errors']} of {found['requests']} requests failed")
    return Load(found["requests"] / found["seconds"], found["p50"], found["p99"])
