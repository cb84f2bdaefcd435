"""A vLLM server in a process of its own, and an HTTP client for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..engine.conftest import reference  # noqa: F401 - a fixture
from ..prepared import ENVIRONMENT

START_SECONDS = 240
WAIT_SECONDS = 30


class Server:
    """`hiddenlake vllm`, with the demo model in float32."""

    def __init__(self, lake: Path, model: Path, log: Path, *options: str) -> None:
        self.lake, self.model, self.log, self.options = lake, str(model), log, options
        self.process: subprocess.Popen | None = None

    def start(self, *arguments: str, headers: dict[str, str] | None = None) -> "Server":
        """arguments : more of vLLM's own.  headers : of every request."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(
                sys.executable,
                "-m",
                "hiddenlake.cli",
                "vllm",
                str(self.lake),
                "--model",
                self.model,
                *self.options,
                "--",
            ),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "512", *arguments),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers=headers)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.http.get("/health").raise_for_status()
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.log.read_text()[-5000:]
                assert time.monotonic() < deadline, self.log.read_text()[-5000:]
                time.sleep(0.5)

    def kill(self) -> None:
        """The server's process, at once. Its engine's must go by itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def chat(self, question: str, capture: str | None = None, headers: dict[str, str] | None = None, **fields: Any):
        """One turn, greedy. capture : its name.  fields : of the request; `xargs` are added to vllm_xargs."""
        xargs = fields.pop("xargs", {}) | ({"hiddenlake": capture} if capture else {})
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        body |= {"max_tokens": 16, **({"vllm_xargs": xargs} if xargs else {}), **fields}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def complete(self, prompt: str | list[str], capture: str, headers: dict[str, str] | None = None, **fields: Any):
        xargs = fields.pop("xargs", {}) | {"hiddenlake": capture}
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 8, "vllm_xargs": xargs, **fields}
        return self.http.post("/v1/completions", json=body, headers=headers)

    def states(self, keys: list[str]) -> list[dict[str, Any]]:
        """Of samples, once they are settled."""
        with ThreadPoolExecutor(8) as pool:
            get = lambda key: self.http.get(f"/v1/hiddenlake/samples/{key}", params={"wait": WAIT_SECONDS})
            return [response.raise_for_status().json() for response in pool.map(get, keys)]

    def facts(self) -> dict[str, Any]:
        return self.http.get("/v1/hiddenlake").raise_for_status().json()

    def committed(self, response: httpx.Response) -> list[str]:
        """The keys that a response names, once all of them are committed."""
        keys = response.raise_for_status().json()["kv_transfer_params"]["hiddenlake"]["keys"]
        states = self.states(keys)
        assert [state["state"] for state in states] == ["committed"] * len(keys), states
        return keys


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """What a streamed response brought."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def server(demo_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    options = ("--sites", "resid_post,mlp_out", "--layers", "0,5,10-12,29", "--ring-bytes", "16MB")
    options += ("--max-request-bytes", "8MB", "--buffer-bytes", "256MiB", "--shard-samples", "8")
    running = Server(folder / "lake", demo_model_folder, folder / "log", *options).start()
    yield running
    running.stop()
