"""The memory that a run is said to take is what it takes at most: the ring, the shard buffers, the taps' buffers on a GPU."""

import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from hiddenlake.cache import estimate
from hiddenlake.cache.capture import Watcher, run_job, start_engine
from hiddenlake.cache.engines import vllm_config
from hiddenlake.cache.engines.vllm import VllmEngine
from hiddenlake.cache.errors import CaptureError, StoreError
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.rows import tap_table
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.worker.staging import device_bytes
from hiddenlake.cache.worker.taps import TapBuffers

from .conftest import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1 << 20

# Batches that are full in every run, however slowly prompts come.
FULL = {"max_num_batched_tokens": 1024, "max_num_seqs": 64}

# What a run takes of the heap, once vLLM has seen such batches: a step's logits (12 MiB, a few times), blocks of rows on
# their way to a shard, Python's objects. A second copy of the rows, or of the shards, would be more.
HEAP = 64 * MIB

# vLLM's processes talk through shared memory, too; and what is mapped while processes are looked at one after the other may
# count twice. A second ring, or second buffers, would be more.
OTHERS = 32 * MIB


class Peak(threading.Thread):
    """Follows the memory of this process and its children: (shared, which the ring and shard buffers are; heap) bytes.

    Pages that processes share are counted once.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.first = self.highest = self._now()

    def _now(self) -> tuple[int, int]:
        this, found = psutil.Process(), Counter()
        for process in (this, *this.children(recursive=True)):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, size, _ = line.split()
                found[name] += int(size) * 1024
        return found["Pss_Shmem:"], found["Pss_Anon:"]

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.highest = tuple(map(max, self.highest, self._now()))

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    @property
    def growth(self) -> tuple[int, int]:
        return self.highest[0] - self.first[0], self.highest[1] - self.first[1]


class Costs(Watcher):
    def planned(self, cost, summary) -> None:
        self.cost = cost


@pytest.mark.parametrize("positions", [("all",), ("paper", "mean_all", "max_prompt")])
def test_a_run_takes_no_more_memory_than_it_says(positions, tiny_model, tmp_path):
    job = plan_job(
        tiny_model, make_task(160), sites=("resid_pre", "attn_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post"),
        positions=positions, dtype="float32", max_new_tokens=48, ring_bytes=256 * MIB, options=FULL,
    )  # fmt: skip
    engine = start_engine("vllm", job.request, job.prompts[0].token_ids)
    try:
        watcher = Costs()
        with Peak() as first:
            summary = run_job(job, out=tmp_path / "x", engine=engine, buffer_bytes=128 * MIB, watcher=watcher)
        again = []
        for name in "abc":
            with Peak() as peak:
                run_job(job, out=tmp_path / name, engine=engine, buffer_bytes=128 * MIB)
            again.append(peak)
    finally:
        engine.close()
    cost = watcher.cost
    said = cost.ring_bytes + cost.buffer_bytes
    # What a run needs is there in each; the allocator's own comes and goes, up to 107 MiB of it.
    (shared, _), heap = first.growth, min(peak.growth[1] for peak in again)
    print(
        f"\n{positions}: ring {cost.ring_bytes / MIB:.0f} MiB and buffers {cost.buffer_bytes / MIB:.0f} MiB projected, "
        f"grown by {shared / MIB:.0f} MiB, the heap by {heap / MIB:.0f} MiB"
    )
    assert summary.committed == 160
    assert cost.ring_bytes <= 256 * MIB and cost.buffer_bytes <= 128 * MIB
    assert min(cost.ring_bytes, cost.buffer_bytes) > 1.5 * max(HEAP, OTHERS), "too small a run to tell"
    assert said / 5 < shared <= said + OTHERS
    assert heap <= HEAP


def test_a_machine_with_too_little_memory_is_refused(tiny_model, tmp_path, monkeypatch):
    job = plan_job(tiny_model, make_task(4), dtype="float32", max_new_tokens=4)
    monkeypatch.setattr(estimate, "free_memory", lambda: 1000)
    with pytest.raises(
        StoreError, match="the memory is too small: shard buffers take .* lower --buffer-bytes or --ring-"
    ):
        run_job(job, out=tmp_path / "x")


def test_what_a_ring_must_hold_is_said(tiny_model):
    """Pools of prompts need a step's rows, however few are kept."""
    job = plan_job(
        tiny_model, make_task(4), positions=["mean_prompt"], dtype="float32", ring_bytes=MIB,
        options={"max_num_batched_tokens": 4096},
    )  # fmt: skip
    with pytest.raises(CaptureError, match="one step up to 4096, .* lower max_num_batched_tokens"):
        VllmEngine(job.request)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_device_bytes_are_those_of_the_buffers(itemsize):
    table = tap_table(
        ("resid_post", "attn_z", "mlp_act", "final_norm"), range(5), {"hidden": 64, "d_attn": 96, "d_mlp": 160}, 7
    )
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    # as make_staging makes them where the device is a GPU
    out = torch.empty((2 * 300, len(table)), dtype=dtype)
    firsts = torch.zeros(len(list(table.taps())), dtype=torch.int64)
    assert device_bytes(300, table, itemsize) == TapBuffers(300, out, firsts).nbytes


@pytest.mark.parametrize(("parallel", "layers"), [({}, 30), ({"pipeline_parallel_size": 2}, 15)])
def test_device_bytes_are_projected(parallel, layers, demo_model_folder, monkeypatch):
    """By hand, for an engine whose platform says that it is no CPU."""
    from vllm.platforms import current_platform

    sites = ("resid_post", "mlp_out")
    assert all(SITES[site].width == "hidden" for site in sites)
    job = plan_job(demo_model_folder, make_task(4), sites=sites, options={"max_num_seqs": 256, **parallel})
    config, memory = vllm_config.configure(job.request)
    assert memory.device_bytes == memory.kv_tokens == 0
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: 80 << 30)
    # 256 sequences, each with one token of a step or with the paper's prompt positions: last_q and -8 to -1
    rows = 256 * 8
    taken, tokens = vllm_config._device_memory(job.request, config, rows)
    row = (2 * layers + 1) * 576
    assert taken == 2 * rows * row * 2 + (2 * rows + 1 + 2 * layers + 1) * 8
    assert tokens == taken // (2 * layers * 3 * 64 * 2)
    assert vllm_config._step_rows(job.request, config) == min(config.scheduler_config.max_num_batched_tokens, rows)
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: 1 << 20)
    with pytest.raises(CaptureError, match="the taps' buffers need .* lower max_num_batched_tokens or max_num_seqs"):
        vllm_config._device_memory(job.request, config, rows)
