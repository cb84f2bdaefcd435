"""Many clients of two servers, and workers that are killed at random: each answer is computed once, is the same for all, and comes."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context

import httpx
import pytest

from hiddenlake.cache.service.database import Database
from hiddenlake.cache.store.catalog import list_captures
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.verify import verify

from .conftest import Served, add_key
from .working import WorkerProcess, chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = 500
CLIENTS = 8
SERVERS = 2
WORKERS = 2

# engine -> how often workers are killed, and how long after the one before, in seconds. vLLM takes long to start.
KILLS = {"transformers": (4, (0.5, 2.0)), "vllm": (3, (2.0, 6.0))}


def client(url: str, key: str, seed: int) -> list[tuple[int, str, str, str, str]]:
    """One client process: asks for prompts that others ask for too, in an order of its own, and reads what it is told of.

    Returns (prompt, key, capture, sample, digest of the activations) of every answer that it got.
    """
    chosen = random.Random(seed)
    order = chosen.sample(range(PROMPTS), PROMPTS)
    found = []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
        while order:
            batch, order = order[:25], order[25:]
            body = {
                "model": "tiny", "inputs": [chat(f"What is number {i}?") for i in batch], "sites": ["mlp_out"],
                "generation": {"max_new_tokens": 6}, "wait": 30,
            }  # fmt: skip
            end = time.monotonic() + 240
            while True:
                assert time.monotonic() < end, "an answer never came"
                response = http.post("/v1/activations:resolve", json=body)
                if response.status_code == 200:
                    break
                assert response.status_code == 202, response.text
            for entry in response.json()["entries"]:
                wanted = {"capture": entry["capture"], "samples": [entry["sample"]], "site": "mlp_out", "format": "raw"}
                read = http.post("/v1/activations:read", json=wanted)
                assert read.status_code == 200, read.text
                prompt = batch[entry["input"]]
                found.append(
                    (prompt, entry["key"], entry["capture"], entry["sample"], sha256(read.content).hexdigest())
                )
    return found


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_every_answer_is_computed_once_and_is_the_same_for_all(tmp_path, tiny_model, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    lake, (kills, pause) = tmp_path / "lake", KILLS[engine]
    lake.mkdir()
    key = add_key(lake, "clients", "compute")
    options = ("--lease", "5", "--attempts", "50")
    servers = [Served(lake, tmp_path / f"server-{n}", key, options).start() for n in range(SERVERS)]
    workers: list[WorkerProcess] = []

    def add_worker() -> WorkerProcess:
        log = tmp_path / f"worker-{len(workers)}"
        workers.append(WorkerProcess(lake, tiny_model, log, *options, "--engine", engine))
        return workers[-1]

    for _ in range(WORKERS):
        add_worker()
    for worker in list(workers):
        worker.wait_ready()
    killed, over = [], threading.Event()

    def kill_at_random() -> None:
        chosen = random.Random(0)
        while len(killed) < kills and not over.wait(chosen.uniform(*pause)):
            living = [worker for worker in workers if worker.process.poll() is None and "is ready" in worker.text()]
            if not living:
                continue
            worker = chosen.choice(living)
            if len(killed) % 2:  # one that only stands still: whoever takes over must end it
                worker.process.send_signal(19)
                killed.append(worker)
            else:
                worker.kill()
                killed.append(worker)
            add_worker()

    killer = threading.Thread(target=kill_at_random)
    try:
        with ProcessPoolExecutor(CLIENTS, mp_context=get_context("spawn")) as pool:
            asked = [pool.submit(client, servers[seed % SERVERS].url, key, seed) for seed in range(CLIENTS)]
            killer.start()
            histories = [one.result() for one in asked]
    finally:
        over.set()
        killer.join()
        for worker in workers:
            worker.process.send_signal(18)
            worker.process.kill()
            worker.process.wait()
        statuses = [server.stop() for server in servers]
    assert set(statuses) == {0} and len(killed) == kills
    assert len(histories) == CLIENTS and all(len(history) == PROMPTS for history in histories)

    # Each prompt has one key, and each key one place and the same bytes, whoever asked and whenever.
    answers = {}
    for prompt, name, capture, sample, content in (row for history in histories for row in history):
        assert answers.setdefault(prompt, (name, capture, sample, content)) == (name, capture, sample, content)
    assert len(answers) == PROMPTS and len({name for name, *_ in answers.values()}) == PROMPTS

    # In the store, no key is there twice, whoever computed it, and every byte is what was committed.
    stored = Counter()
    for entry in list_captures(lake):
        assert verify(lake / entry["name"]).ok
        stored.update(open_capture(lake / entry["name"]).keys)
    assert len(stored) == PROMPTS and set(stored.values()) == {1}

    # No answer took more leases than one, and one for each worker that ended while it held it.
    rows = Database(lake).read("SELECT state, attempts, ids FROM work")
    assert len(rows) == PROMPTS and {row["state"] for row in rows} == {"done"}
    assert all(1 <= row["attempts"] <= 1 + kills and row["ids"] is None for row in rows)
    # What was stopped for longer than its lease was ended by whoever took over.
    assert all(worker.process.wait(60) == -9 for worker in killed)
