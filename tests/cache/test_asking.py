"""Questions about answers, put while captures go on: with the transformers engine and a tiny random model."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hiddenlake
from hiddenlake.cache.asking import Asking
from hiddenlake.cache.capture import run_job, start_engine
from hiddenlake.cache.engines.transformers import TransformersEngine
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import GREEDY, Sampling
from hiddenlake.cache.inquiry import Ask, Reply
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.samples import Generation, Judgement, Prompt, Question

N, TRIES = 7, 3


@dataclass
class Words:
    """Asks three times about every other answer, once greedily: the replies choose the word that is the exact answer."""

    longest: int = 250
    served: None = None
    log: dict[int, list[Reply | None]] = field(default_factory=dict)

    def inquire(self, question, answer, judgement):
        log = self.log[question.index] = []
        if question.index % 2:
            return judgement
        for k in range(TRIES):
            log.append((yield Ask(f"Say {question.index}: {answer[:40]}", 5, Sampling(float(k > 0), seed=k))))
        words = answer.split()
        return Judgement(False, words[sum(map(ord, "".join(r.text for r in log if r))) % len(words)])


class Task:
    name, rules = "words", "words 1"

    def __init__(self, follow_up=None, exact=None):
        self.questions = [Question(i, f"Say {'something ' * i}", ("x",), group=str(i)) for i in range(N)]
        self.exact = exact or {}
        if follow_up is not None:
            self.follow_up = follow_up

    def judge(self, question, answer):
        return Judgement(False, self.exact.get(question.index))


def plan(model, task, **settings):
    settings = {"sites": ["mlp_out"], "dtype": "float32", "max_new_tokens": 8, "options": {"batch_size": 2}} | settings
    return plan_job(model, task, **settings)


@pytest.fixture(scope="module")
def asked(tiny_model, tmp_path_factory):
    """(capture, follow-up, summary, engine) of a run whose ring has room for two samples."""
    job = plan(tiny_model, Task(words := Words()))
    engine = start_engine("transformers", job.request, job.prompts[0].token_ids)
    out = tmp_path_factory.mktemp("lake") / "asked"
    summary = run_job(job, out=out, engine=engine, shard_samples=4)
    return hiddenlake.open_capture(out), words, summary, engine


def test_a_full_ring_that_waits_for_replies_goes_on_and_is_left_empty(asked):
    """Two samples fill the ring, and both may wait for replies."""
    capture, words, summary, engine = asked
    assert (summary.committed, summary.failed, len(capture)) == (N, 0, N)
    assert not engine._rows and not engine._asked and not engine._replies
    replies = [reply for log in words.log.values() for reply in log]
    assert [len(words.log[i]) for i in range(N)] == [TRIES, 0] * 3 + [TRIES]
    assert (summary.asked.questions, summary.asked.too_long) == (len(replies), 0)
    assert summary.asked.tokens == sum(reply.tokens for reply in replies) > 0
    assert summary.asked.prompt_tokens == sum(reply.prompt_tokens for reply in replies) > 0


def test_the_rows_are_those_of_the_span_that_was_found(asked, tiny_model, tmp_path):
    """As if the judge had known it."""
    capture, *_ = asked
    samples = capture.samples().to_pylist()
    exact = {s["index"]: s["exact_answer"] for s in samples}
    assert [exact[i] is not None for i in range(N)] == [True, False] * 3 + [True]
    assert all(s["exact_answer_valid"] == (s["index"] % 2 == 0) for s in samples)
    run_job(plan(tiny_model, Task(exact=exact)), out=tmp_path / "known", engine="transformers")
    known = hiddenlake.open_capture(tmp_path / "known")
    assert known.samples()["token_index"].to_pylist() == [s["token_index"] for s in samples]
    names = capture.coverage.positions
    assert len({s["token_index"][names.index("exact_answer_last")] for s in samples[::2]}) > 1
    found, expected = (c.read("mlp_out", dtype="float32") for c in (capture, known))
    np.testing.assert_allclose(found, expected, atol=1e-6, equal_nan=True)


def test_a_reply_is_what_the_model_generates(asked, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    capture, words, *_ = asked
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answers = {s["index"]: s["answer"] for s in capture.samples().to_pylist()}
    for index in (0, 4):
        text = f"Say {index}: {answers[index][:40]}"
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            output = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
        first = words.log[index][0]
        assert first.text == tokenizer.decode(output, skip_special_tokens=True)
        assert (first.prompt_tokens, first.tokens, first.ended) == (ids.shape[1], 5, False)


def test_an_interrupted_run_goes_on_to_the_same_exact_answers(asked, tiny_model, tmp_path):
    capture, words, *_ = asked
    job = plan(tiny_model, Task(again := Words()))

    def interrupt(key, token_ids, ask, seed):
        if ask.sampling.seed == TRIES - 1 and len(again.log) > 4:
            raise KeyboardInterrupt
        queue(key, token_ids, ask, seed)

    engine = start_engine("transformers", job.request, ())
    queue, engine.ask = engine.ask, interrupt
    summary = run_job(job, out=tmp_path / "x", engine=engine, shard_samples=2)
    assert summary.interrupted and 0 < summary.committed < N
    summary = run_job(job, out=tmp_path / "x", engine="transformers")
    assert summary.present + summary.committed == N
    found = hiddenlake.open_capture(tmp_path / "x")
    for column in ("key", "exact_answer", "token_ids", "token_index"):
        assert found.samples()[column].to_pylist() == capture.samples()[column].to_pylist()
    assert again.log == words.log, "each reply is drawn with the seed of its sample and try"
    assert len({reply.text for log in words.log.values() for reply in log}) > TRIES


def test_what_is_too_long_is_not_asked_and_counted(tiny_model, tmp_path):
    """By the follow-up's own limit, though the engine could take it."""
    words = Words()
    lengths = {i: 5 + len(plan(tiny_model, Task()).request.model.encode(f"Say {i}: ")[1]) for i in range(N)}
    words.longest = min(lengths.values())  # every answer is longer than none
    summary = run_job(plan(tiny_model, Task(words)), out=tmp_path / "x", engine="transformers")
    assert (summary.committed, summary.asked.questions, summary.asked.too_long) == (N, 0, 4 * TRIES)
    assert words.log[0] == [None] * TRIES
    assert hiddenlake.open_capture(tmp_path / "x").samples()["exact_answer"].to_pylist()[1] is None


def test_questions_make_room_in_the_engine_up_to_the_context(tiny_model):
    request = plan(tiny_model, Task(Words(longest=5000))).request
    assert request.ask_length == request.model.context == 256
    assert request.max_length == plan(tiny_model, Task()).request.max_length
    with pytest.raises(
        BadInputError, match="started for questions about answers of up to 0 tokens, this job needs 256"
    ):
        plan(tiny_model, Task()).request.check_serves(request)


def test_given_answers_are_not_asked_about(tiny_model):
    task = Task(Words())
    task.questions = [Question(0, "Say x", ("x",), given="x")]
    with pytest.raises(BadInputError, match="task words: a model is to be asked about answers that are given"):
        plan(tiny_model, task)


def test_questions_are_batched_with_their_like_only(tiny_model):
    request = plan(tiny_model, Task(Words())).request
    engine = TransformersEngine(request)
    engine.start(())
    prompts = [request.model.encode(f"Say {'something ' * i}")[1] for i in range(5)]
    asks = [Ask("", 4), Ask("", 4, Sampling(stop=("e",))), Ask("", 6), Ask("", 6, Sampling(1.0, seed=3)), Ask("", 4)]

    def replies(chosen):
        for i in chosen:
            engine.ask(str(i), prompts[i], asks[i], asks[i].sampling.seed_of(0, 0))
        assert engine.step() == []
        found = dict(engine.replies())
        assert len(found) == len(chosen) and engine.replies() == []
        return found

    together = replies(range(5))
    assert [together[str(i)].tokens for i in (0, 2, 3, 4)] == [4, 6, 6, 4] and "e" not in together["1"].text
    assert [together[str(i)].prompt_tokens for i in range(5)] == [len(prompt) for prompt in prompts]
    for i in range(5):
        assert replies([i]) == {str(i): together[str(i)]}, "alone as in the batch"
    with pytest.raises(BadInputError, match="max_new_tokens of a reply is 0"):
        Ask("", 0)


class Scripted:
    """An asker whose replies come when, and in the order in which, a test says. A reply spells its question."""

    steps = True

    def __init__(self, short):
        self.short, self.pending, self.due, self.closed = short, [], [], False

    def ask(self, key, ask, seed):
        if not self.short(ask.text):
            return False
        assert key not in [k for k, _ in self.pending], "one question at a time"
        self.pending.append((key, ask.text))
        return True

    def replies(self, wait):
        found, self.due = self.due, []
        return [(key, Reply(f"re {text}", True, 2, 3)) for key, text in found]

    def close(self):
        self.closed = True


class Chain:
    """Asks an answer's number of questions; the exact answer is all that was replied."""

    longest, served = 100, None

    def inquire(self, question, answer, judgement):
        said = []
        for k in range(int(answer)):
            reply = yield Ask(f"{question.index}.{k}", 1)
            said.append(reply and reply.text)
        return Judgement(True, repr(said))


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=8), long=st.sets(st.integers(0, 3)), chance=st.randoms())
def test_each_inquiry_gets_its_own_replies_in_order_and_ends_once(counts, long, chance):
    asker = Scripted(lambda text: int(text.split(".")[1]) not in long)
    asking = Asking(Chain(), asker)
    ended = {}
    for i, count in enumerate(counts):
        prompt = Prompt(f"k{i}", Question(i, "", ()), 0, "", (1,))
        asking.begin(prompt, Generation(f"k{i}", (1,), (0.0,), "stop"), str(count), Judgement(False, None))
    while True:
        for generation, _, judgement in asking.ended(wait=False):
            assert generation.key not in ended
            ended[generation.key] = judgement
        assert len(asking) == len(asker.pending) == len(counts) - len(ended)
        if not asker.pending:
            break
        chance.shuffle(asker.pending)
        cut = chance.randint(1, len(asker.pending))
        asker.due, asker.pending = asker.pending[:cut], asker.pending[cut:]
    for i, count in enumerate(counts):
        said = [None if k in long else f"re {i}.{k}" for k in range(count)]
        assert ended[f"k{i}"] == Judgement(True, repr(said))
    asked = sum(k not in long for count in counts for k in range(count))
    assert (asking.asked.questions, asking.asked.too_long) == (asked, sum(counts) - asked)
    assert (asking.asked.prompt_tokens, asking.asked.tokens) == (2 * asked, 3 * asked)
    asking.close()
    assert asker.closed


def test_nothing_to_ask_ends_at_once():
    asking = Asking(None, None)
    generation = Generation("k", (1,), (0.0,), "stop")
    asking.begin(Prompt("k", Question(0, "", ()), 0, "", (1,)), generation, "yes", Judgement(True, "yes"))
    assert asking.ended(wait=True) == [(generation, "yes", Judgement(True, "yes"))]
    assert len(asking) == 0 and not asking.in_engine and asking.ended(wait=True) == []
    asking.close()


def test_greedy_replies_have_no_seed_and_drawn_ones_one_each():
    assert GREEDY.seed_of(3, 0) is None
    seeds = {Sampling(1.0, seed=k).seed_of(i, j) for k in range(1, 5) for i in range(50) for j in range(3)}
    assert len(seeds) == 4 * 50 * 3
