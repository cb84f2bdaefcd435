"""Workers in processes of their own, on the tiny model with Hugging Face's engine, which starts quickly."""

import time
from pathlib import Path

from .. import prepared

START_SECONDS = 120

# Few tokens, so that a prompt takes milliseconds.
OPTIONS = (
    "--engine", "transformers", "--max-prompt", "128", "--max-new-tokens", "64", "--sites", "mlp_out,resid_post",
    "--shard-samples", "8", "--publish", "0.2", "--buffer-bytes", "256MiB",
)  # fmt: skip


class WorkerProcess:
    """`hiddenlake worker`. log : its stderr."""

    def __init__(self, lake: Path, model: Path, log: Path, *options: str) -> None:
        self.log = log
        self.process = prepared.start(log, "worker", lake, "--model", model, *OPTIONS, *options)

    def wait_ready(self) -> "WorkerProcess":
        end = time.monotonic() + START_SECONDS
        while "is ready" not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, self.text()[-3000:]
            time.sleep(0.05)
        return self

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


def chat(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}
