"""What any row map must do: say of each row of a batch which request and which token of it the row is.

Both runners' maps are given vLLM's own batches, filled with what vLLM's V1 runner was seen to do (recorded.json), and with
random ones. Of a recorded row, the token, the position and the KV-cache blocks that it was written to are known.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.worker import rows_v1, rows_v2

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm

RUNS = json.loads(Path(__file__).with_name("recorded.json").read_text())
MOST_REQUESTS, MOST_TOKENS, LONGEST = 16, 512, 1024


@dataclass(frozen=True)
class Step:
    """One batch: requests in order, tokens of each in this step and before it, draft tokens of each that has some."""

    req_ids: list[str]
    scheduled: list[int]
    computed: list[int]
    drafts: dict[str, int]

    @property
    def truth(self) -> list[tuple[str, int]]:
        """(request, token index) of each row."""
        each = zip(self.req_ids, self.scheduled, self.computed, strict=True)
        return [(name, before + i) for name, n, before in each for i in range(n)]


def scheduler_output(step: Step):
    """vLLM's, as its scheduler gives it: in no particular order."""
    from vllm.v1.core.sched.output import SchedulerOutput

    scheduled = dict(sorted(zip(step.req_ids, step.scheduled, strict=True)))
    return replace(
        SchedulerOutput.make_empty(),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(step.scheduled),
        scheduled_spec_decode_tokens={name: [0] * n for name, n in step.drafts.items()},
    )


def v1_batch(requests: dict[str, int]):
    """vLLM's V1 batch with these requests, {name: tokens before this step}."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    batch = InputBatch(MOST_REQUESTS, LONGEST, MOST_TOKENS, torch.device("cpu"), 100, [32], [LONGEST // 32])
    for name, before in requests.items():
        add(batch, name, before)
    return batch


def add(batch, name: str, before: int) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    batch.add_request(CachedRequestState(name, [1] * (before + 1), [], SamplingParams(), None, ([1],), before, []))


def v1_rows(step: Step, output=None) -> Iterator[tuple[str, int, int, int]]:
    batch = v1_batch(dict(zip(step.req_ids, step.computed, strict=True)))
    return rows_v1.batch_rows(SimpleNamespace(input_batch=batch), output or scheduler_output(step))


def v2_batch(step: Step, **wrong):
    """vLLM's V2 batch, with padding behind the last request as for a CUDA graph."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    n, rows = len(step.req_ids), sum(step.scheduled)
    buffers = InputBuffers(MOST_REQUESTS, 2 * MOST_TOKENS, torch.device("cpu"))
    starts = np.full(MOST_REQUESTS + 1, rows, np.int32)
    starts[: n + 1] = np.cumsum([0, *step.scheduled])
    return replace(
        InputBatch.make_dummy(n, rows, buffers),
        req_ids=step.req_ids,
        num_reqs_after_padding=MOST_REQUESTS,
        num_tokens_after_padding=rows + 13,
        num_scheduled_tokens=np.array(step.scheduled, np.int32),
        query_start_loc_np=starts,
        num_computed_tokens_np=np.array(step.computed, np.int32),
        num_draft_tokens=sum(step.drafts.values()),
        **wrong,
    )


def v2_rows(step: Step, output=None) -> Iterator[tuple[str, int, int, int]]:
    return rows_v2.batch_rows(output or scheduler_output(step), v2_batch(step))


MAPS: dict[str, Callable] = {"V1": v1_rows, "V2": v2_rows}


@pytest.fixture(params=MAPS)
def rows_of(request):
    return MAPS[request.param]


def expand(rows) -> list[tuple[str, int]]:
    """(request, token index) of each row; each row is named once."""
    named = {first + i: (name, start + i) for name, first, start, n in rows for i in range(n)}
    assert sorted(named) == list(range(len(named)))
    return [named[row] for row in range(len(named))]


def recorded(run: str) -> list[tuple[Step, list[tuple[str, int]]]]:
    """(step, (request, token index) of each row as it was fed)."""
    return [
        (
            Step(*(step[name] for name in ("req_ids", "scheduled", "computed", "drafts"))),
            [
                (step["req_ids"][owner], position)
                for owner, position in zip(step["owners"], step["positions"], strict=True)
            ],
        )
        for step in RUNS[run]
    ]


def in_v2_order(step: Step, truth: list[tuple[str, int]]) -> tuple[Step, list[tuple[str, int]]]:
    """The V2 runner puts shorter parts first."""
    order = sorted(range(len(step.req_ids)), key=lambda i: (step.scheduled[i] != 1, step.scheduled[i]))
    moved = Step(*([values[i] for i in order] for values in (step.req_ids, step.scheduled, step.computed)), step.drafts)
    place = {name: i for i, name in enumerate(moved.req_ids)}
    return moved, sorted(truth, key=lambda row: (place[row[0]], row[1]))


def test_the_recorded_batches_are_hard():
    """Or the tests below would show little."""
    steps = recorded("scheduled")
    parts = {(name, n) for step, _ in steps for name, n in zip(step.req_ids, step.scheduled, strict=True) if n > 1}
    assert len(parts) > len({name for name, _ in parts}), "prompts in parts"
    assert any(1 in step.scheduled and max(step.scheduled) > 8 for step, _ in steps), "prefill beside decoding"
    seen: dict[tuple[str, int], int] = {}
    for _, truth in steps:
        for row in truth:
            seen[row] = seen.get(row, 0) + 1
    assert max(seen.values()) > 1, "preempted requests are computed again"
    order = [[name for name in step.req_ids if name in after.req_ids] for (step, _), (after, _) in pairwise(steps)]
    kept = [[name for name in after.req_ids if name in step.req_ids] for (step, _), (after, _) in pairwise(steps)]
    assert order != kept, "requests change their places"
    assert any(step.drafts for step, _ in recorded("drafts"))


@pytest.mark.parametrize("run", ["scheduled", "drafts"])
def test_v1_rows_are_what_was_fed(run):
    for step, truth in recorded(run):
        assert expand(v1_rows(step)) == truth == step.truth


def test_v2_rows_are_what_was_fed():
    for step, truth in recorded("scheduled"):
        moved, expected = in_v2_order(step, truth)
        assert expand(v2_rows(moved)) == expected


def test_rows_hold_the_tokens_of_their_sequences():
    """What was fed at a token's place is one token, in every step that computed it, but for drafts."""
    tokens: dict[tuple[str, int], int] = {}
    for (step, _), facts in zip(recorded("scheduled"), RUNS["scheduled"], strict=True):
        for row, token in zip(expand(v1_rows(step)), facts["tokens"], strict=True):
            assert tokens.setdefault(row, token) == token


@st.composite
def batches(draw) -> Step:
    n = draw(st.integers(1, MOST_REQUESTS))
    scheduled = draw(
        st.lists(st.one_of(st.just(1), st.integers(1, MOST_TOKENS // MOST_REQUESTS)), min_size=n, max_size=n)
    )
    computed = draw(st.lists(st.integers(0, LONGEST - 100), min_size=n, max_size=n))
    names = draw(st.permutations([f"{i:x}-{i * 7919 % 65536:08x}" for i in range(n)]))
    return Step(names, scheduled, computed, {})


@settings(max_examples=50, deadline=None)
@given(step=batches())
@pytest.mark.parametrize("name", MAPS)
def test_random_batches(name, step):
    assert expand(MAPS[name](step)) == step.truth


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_v1_follows_requests_that_change_their_places(data):
    """Requests leave, others take their places, and the last ones move down."""
    step = data.draw(batches())
    before = dict(zip(step.req_ids, step.computed, strict=True))
    batch = v1_batch(before)
    for name in data.draw(st.lists(st.sampled_from(step.req_ids), unique=True, max_size=len(before) - 1)):
        batch.remove_request(name)
        del before[name]
    for i in range(data.draw(st.integers(0, MOST_REQUESTS - len(before)))):
        before[f"new-{i}"] = 40 + i
        add(batch, f"new-{i}", 40 + i)
    batch.condense()
    names = batch.req_ids
    assert sorted(names) == sorted(before)
    moved = Step(names, [1 + i % 3 for i in range(len(names))], [before[name] for name in names], {})
    assert expand(rows_v1.batch_rows(SimpleNamespace(input_batch=batch), scheduler_output(moved))) == moved.truth


STEP = Step(["a", "b", "c"], [1, 4, 7], [9, 0, 3], {})
WRONG = {
    "a row too many": replace(STEP, scheduled=[1, 4, 8]),
    "a row too few": replace(STEP, scheduled=[1, 4, 6]),
    "rows of one request counted to another": replace(STEP, scheduled=[1, 5, 6]),
    "a request that is not in the batch": Step([*STEP.req_ids, "d"], [*STEP.scheduled, 1], [*STEP.computed, 0], {}),
}


@pytest.mark.parametrize("case", WRONG)
def test_v2_refuses_batches_that_it_does_not_understand(case):
    with pytest.raises(RuntimeError, match="tokens are scheduled"):
        expand(v2_rows(STEP, scheduler_output(WRONG[case])))


def test_v1_refuses_batches_that_it_does_not_understand():
    with pytest.raises(RuntimeError, match="the batch has 12 rows, but 13 tokens are scheduled"):
        expand(v1_rows(STEP, scheduler_output(WRONG["a request that is not in the batch"])))
    with pytest.raises(RuntimeError, match="the batch has 12 rows, but 11 tokens are scheduled"):
        expand(v1_rows(STEP, replace(scheduler_output(STEP), total_num_scheduled_tokens=11)))


def test_v2_refuses_drafts():
    """With them, the V2 runner knows on the device alone how many tokens a request has."""
    drafted = [step for step, _ in recorded("drafts") if step.drafts]
    for step in drafted:
        with pytest.raises(RuntimeError, match="speculative decoding was not tested with vLLM's V2 model runner"):
            expand(v2_rows(step))


@pytest.mark.parametrize("wrong", [{"num_tokens": 11}, {"num_tokens": 13}])
def test_v2_refuses_a_count_of_rows_that_does_not_add_up(wrong):
    with pytest.raises(RuntimeError, match="the batch has 12 rows"):
        expand(rows_v2.batch_rows(scheduler_output(STEP), v2_batch(STEP, **wrong)))
