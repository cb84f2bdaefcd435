"""Questions about answers beside captured requests: batched with them, never captured, and nothing of them stays."""

from dataclasses import dataclass, field

import pytest

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.inquiry import Ask, Reply
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER
from hiddenlake.cache.samples import Judgement

from .captures import TOLERANCE, assert_greedy, capture_all, recorder_of, running, scheduler_of, worst_errors
from .conftest import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

N, NEW, TRIES = 10, 12, 3
HEAD = "Here is what somebody said about a city, and one word of it matters most. Name that word, and nothing else. "


@dataclass
class Pick:
    """Asks about two of three answers, greedily and then drawn. The replies choose the word that is the exact answer."""

    longest: int = 500
    served: None = None
    log: dict[int, list[tuple[str, Reply]]] = field(default_factory=dict)

    def inquire(self, question, answer, judgement):
        log = self.log[question.index] = []
        if question.index % 3 == 0:
            return judgement
        text = HEAD * (1 + question.index) + answer
        for k in range(TRIES):
            log.append((text, (yield Ask(text, 6, Sampling(float(k > 0), seed=k, stop=("\n",))))))
        words = answer.split()
        return Judgement(False, words[sum(map(ord, "".join(reply.text for _, reply in log))) % len(words)])


def plan(model, pick, **settings):
    task = make_task(N)
    task.follow_up = pick
    settings = {"sites": ("mlp_out", "resid_post"), "positions": [*PAPER, "mean_exact_answer"]} | settings
    return plan_job(model, task, dtype="float32", max_new_tokens=NEW, **settings)


def rows_of(model, samples):
    """Ring bytes for so many samples."""
    return samples * plan(model, Pick()).request.sample_bytes


@pytest.fixture(scope="module", params=["roomy", "tight"])
def run(request, demo_model_folder, module_path):
    """(capture, job, follow-up, summary). tight : a ring for two samples, both of which may wait for replies."""
    settings = {"roomy": {}, "tight": {"ring_bytes": rows_of(demo_model_folder, 2)}}[request.param]
    job = plan(demo_model_folder, pick := Pick(), **settings, options={"block_size": 32})
    with running(job) as engine:
        assert (engine.memory.samples == 2) == (request.param == "tight")
        capture, summary = capture_all(job, engine, module_path / request.param)
        [after] = engine.stats()
        assert (after["books"], after["free"]) == (0, len(recorder_of(engine).bits))
        assert not (engine._reserved or engine._prompts or engine._asked or engine._replies)
        assert not scheduler_of(engine).requests
    return capture, job, pick, summary


@pytest.fixture(scope="module")
def replies(demo_model_folder):
    """{row: what Hugging Face replies}: the same questions and seeds, but drawn replies only where they are greedy."""
    job = plan(demo_model_folder, Pick(), options={"batch_size": 1})
    engine = start_engine("transformers", job.request, ())

    def reply(text, ask):
        engine.ask("k", job.request.model.encode(text)[1], ask, None)
        engine.step()
        [(_, found)] = engine.replies()
        return found

    return reply


def test_every_question_was_asked_and_counted(run):
    capture, job, pick, summary = run
    asked = [reply for log in pick.log.values() for _, reply in log]
    assert sorted(pick.log) == list(range(N)) and len(asked) == TRIES * 6
    assert (summary.asked.questions, summary.asked.too_long) == (len(asked), 0)
    assert summary.asked.tokens == sum(reply.tokens for reply in asked)
    assert max(reply.prompt_tokens for reply in asked) > job.request.max_length, "longer than any captured sequence"


def test_rows_equal_hugging_face_where_the_replies_say(run, reference):
    capture, job, pick, _ = run
    names, decode = capture.coverage.positions, job.request.model.decode
    for sample in capture.samples().to_pylist():
        if sample["index"] % 3 and sample["answer"].strip():
            first, last = (sample["token_index"][names.index(f"exact_answer_{edge}")] for edge in ("first", "last"))
            assert sample["exact_answer_valid"] and sample["exact_answer"] in sample["answer"]
            spelled = decode(sample["token_ids"][first : last + 1]).lower()
            assert sample["exact_answer"].lower() in spelled
    worst = worst_errors(capture, reference)
    print(f"\nworst relative L2 error by site {worst}")
    assert max(worst.values()) <= TOLERANCE
    assert_greedy(capture, reference, 4)


def test_greedy_replies_equal_hugging_face(run, replies):
    for log in [log for log in run[2].log.values() if log][:3]:
        text, found = log[0]
        expected = replies(text, Ask(text, 6, Sampling(stop=("\n",))))
        assert found == expected


_seen: dict[int, list[tuple[str, Reply]]] = {}


def test_replies_do_not_depend_on_the_batch(run):
    """Of both runs: each is drawn with the seed of its sample and try."""
    log = run[2].log
    assert len({reply.text for entries in log.values() for _, reply in entries}) > 6
    if _seen:
        assert log == _seen
    _seen.update(log)


def test_a_sample_that_is_aborted_takes_its_question_along(demo_model_folder):
    job = plan(demo_model_folder, Pick(), options={"block_size": 32})
    with running(job) as engine:
        [before] = engine.stats()
        keys = [prompt.key for prompt in job.prompts[:3]]
        for prompt in job.prompts[:3]:
            engine.submit(prompt)
        finished = []
        while len(finished) < 3:
            finished += engine.step()
        _, ids = job.request.model.encode(HEAD)
        for key in keys:
            engine.ask(key, ids, Ask(HEAD, 20), None)
        engine.step()
        assert len(scheduler_of(engine).requests) == 3
        engine.abort(keys[:2])
        assert len(scheduler_of(engine).requests) == 1
        found = []
        while not found:
            assert engine.step() == []
            found = engine.replies()
        assert [key for key, _ in found] == keys[2:]
        engine.abort(keys[2:])
        [after] = engine.stats()
        assert (after["free"], after["books"]) == (before["free"], 0)
        assert not (engine._asked or engine._reserved)
