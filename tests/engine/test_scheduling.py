"""Chunked prefill and forced preemption leave the same rows, each at its own token."""

import numpy as np
import pytest

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER, resolve
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard import Shard, ShardBuffer
from hiddenlake.cache.worker.plan import Placement

from .conftest import SITES, make_task, relative_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N = 12

CASES = {
    # at most 64 tokens a step: prompts of up to 170 tokens come in three chunks, mixed with decoding
    "chunked_prefill": {"max_num_batched_tokens": 64, "max_num_seqs": 8},
    # 16 blocks of 32 tokens: prompts are let in until they are full, and growing answers throw some out again
    "preemption": {"max_num_batched_tokens": 256, "max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 16},
}


@pytest.fixture(scope="module", params=CASES)
def run(request, demo_model_folder):
    """(case, prompts, generations by key, shard views, worker's counts) of one engine run."""
    job = plan_job(
        demo_model_folder, make_task(N), sites=SITES, dtype="float32", max_new_tokens=24, options=CASES[request.param]
    )
    prompts = job.prompts
    buffer = ShardBuffer(Layout(job.coverage, 16))
    shard = Shard(0, 0, buffer)
    engine = start_engine("vllm", job.request, prompts[0].token_ids)
    try:
        done = {}
        for prompt in prompts:
            assert engine.has_room()
            engine.submit(prompt)
        while len(done) < N:
            done |= {g.key: g for g in engine.step()}
        placements = []
        for slot, prompt in enumerate(prompts):
            ids = (*prompt.token_ids, *done[prompt.key].answer_ids)
            q = len(prompt.token_ids)
            index = resolve(PAPER, q, len(ids), (q, q + 1))
            placements.append(Placement(prompt.key, ids, tuple(index.tolist()), slot))
        counts = engine.stats()
        assert engine.store(shard.handle, placements) == [None] * N
        empty = engine.stats()
    finally:
        engine.close()
    views = {site: view.copy() for site, view in buffer.views.items()}
    buffer.close()
    return request.param, placements, done, views, counts, empty


def test_scheduled_rows_equal_hugging_face(run, reference):
    """Relative L2 error a token, in float32. Rows that preemption had computed twice are held to the same 1e-4."""
    case, placements, _, views, _, _ = run
    worst = dict.fromkeys((*SITES, "embed"), 0.0)
    for placement in placements:
        expected = reference(placement.token_ids)
        for p, token in enumerate(placement.token_index):
            for site in worst:
                found = views[site][..., p, placement.slot, :]
                if token >= 0:
                    worst[site] = max(worst[site], float(relative_error(found, expected[site][..., token, :]).max()))
                else:
                    assert np.isnan(found).all()
    print(f"\n{case}: worst relative L2 error by site {worst}")
    assert max(worst.values()) <= 1e-4


def test_preemption_happened(run):
    case, _, _, _, counts, _ = run
    print(f"\n{case}: {counts}")
    assert (counts["recomputed"] > 0) == (case == "preemption")


def test_rows_are_given_back(run):
    _, _, _, _, counts, empty = run
    assert counts["books"] == N and counts["free"] < empty["free"]
    assert empty["books"] == 0


def test_greedy_answers_are_hugging_faces(run, reference):
    """Each generated token is the most probable one given what stands before it, or a near-tie."""
    _, placements, done, _, _, _ = run
    for placement in placements[:3]:
        answer = done[placement.key].answer_ids
        q = len(placement.token_ids) - len(answer)
        logits = reference(placement.token_ids)["logits"][q - 1 : -1]
        assert (logits.max(-1) - logits[np.arange(len(answer)), list(answer)] < 1e-3).all()
