"""A served model is asked over HTTP: here a small server that behaves, and misbehaves, as real ones do."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import hiddenlake
from hiddenlake.cache import chat_server
from hiddenlake.cache.capture import run_job
from hiddenlake.cache.chat_server import ChatAsker, find_served
from hiddenlake.cache.errors import BadInputError, CaptureError
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.inquiry import Ask, Reply, ServedModel
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.samples import Judgement, Question


@dataclass
class Served:
    """answers : (status, body) by request; the last one stays."""

    url: str = ""
    models: list = field(default_factory=lambda: [{"id": "big"}])
    answers: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    keys: list = field(default_factory=list)


def completion(text, reason="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(chat_server, "_PAUSES", (0, 0))
    state = Served()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": state.models} if self.path == "/v1/models" else {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                state.asked.append(body)
                state.keys.append(self.headers.get("Authorization"))
                answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            self.reply(*(answer(body) if callable(answer) else answer))

        def reply(self, status, body):
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()


def test_the_model_is_the_only_one_or_the_one_that_is_named(served):
    assert find_served(f"{served.url}/") == ServedModel(served.url, "big")
    served.models = [{"id": "big"}, {"id": "org/small"}]
    assert find_served(f"{served.url}#org/small") == ServedModel(served.url, "org/small")
    with pytest.raises(BadInputError, match=r"serves big, org/small: expected one model.*/v1#big"):
        find_served(served.url)
    with pytest.raises(BadInputError, match="does not serve 'tiny': it has big, org/small"):
        find_served(f"{served.url}#tiny")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "other"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(BadInputError, match="is no address of a server: expected one like http://"):
        find_served(url)


def test_a_server_that_is_not_there_or_another_one_is_named(served):
    with pytest.raises(CaptureError, match="/models names no models"):
        find_served(served.url + "/x")
    with pytest.raises(CaptureError, match=r"127.0.0.1:1/v1/models answered .*[Rr]efused"):
        find_served("http://127.0.0.1:1/v1")


def ask_one(served, ask, seed=None):
    asker = ChatAsker(ServedModel(served.url, "big"))
    try:
        assert asker.ask("k", ask, seed)
        return asker.replies(wait=True)
    finally:
        asker.close()


def test_what_is_asked_and_what_is_replied(served, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served.answers = [completion("Lima"), completion("Li", "length"), completion(None)]
    assert ask_one(served, Ask("Which?", 9)) == [("k", Reply("Lima", True, 7, 2))]
    message = {"model": "big", "messages": [{"role": "user", "content": "Which?"}], "max_tokens": 9, "top_p": 1.0}
    assert served.asked == [message | {"temperature": 0.0}]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    drawn = Ask("Which?", 9, Sampling(0.5, top_k=3, stop=("\n",)))
    assert ask_one(served, drawn, 12) == [("k", Reply("Li", False, 7, 2))]
    assert served.asked[1] == message | {"temperature": 0.5, "seed": 12, "top_k": 3, "stop": ["\n"]}
    assert ask_one(served, Ask("Which?", 9)) == [("k", Reply("", True, 7, 2))]
    assert served.keys == [None, "Bearer secret", "Bearer secret"]


@pytest.mark.parametrize(
    "said", ["This model's maximum context length is 8 tokens.", '{"type": "exceed_context_size_error"}']
)
def test_a_question_that_is_too_long_has_no_reply(served, said):
    served.answers = [(400, said)]
    assert ask_one(served, Ask("Which?", 9)) == [("k", None)]


def test_a_busy_server_is_asked_again_and_a_broken_one_is_not(served):
    served.answers = [(503, "starting"), (429, "slow down"), completion("Lima")]
    assert ask_one(served, Ask("Which?", 9)) == [("k", Reply("Lima", True, 7, 2))]
    for answer, sentence, tries in (
        ((503, "starting"), "503: starting", 3),
        ((401, "who are you"), "401: who are you", 1),
        ((200, "<html>"), "not JSON", 1),
        ((200, {"choices": []}), "expected one chat completion", 1),
    ):
        served.asked, served.answers = [], [answer]
        with pytest.raises(CaptureError, match=sentence):
            ask_one(served, Ask("Which?", 9))
        assert len(served.asked) == tries


class FirstWord:
    """The reply chooses between the answer's first and last word."""

    longest = 100

    def __init__(self, served):
        self.served = served

    def inquire(self, question, answer, judgement):
        reply = yield Ask(f"{question.index}", 3)
        if reply is None:
            return judgement
        return Judgement(False, answer.split()[int(reply.text)])


class Task:
    name, rules = "words", "words 1"

    def __init__(self, served):
        self.questions = [Question(i, f"Say {'something ' * i}", ("x",), group=str(i)) for i in range(9)]
        self.follow_up = FirstWord(served)

    def judge(self, question, answer):
        return Judgement(False, None)


SETTINGS = {"sites": ["mlp_out"], "max_new_tokens": 6, "options": {"batch_size": 3}}


def choose(body):
    index = int(body["messages"][0]["content"])
    return (400, "context length exceeded") if index == 4 else completion(str(-(index % 2)))


def test_a_capture_whose_exact_answers_a_served_model_finds(served, tiny_model, tmp_path):
    served.answers = [choose]
    job = plan_job(tiny_model, Task(ServedModel(served.url, "big")), **SETTINGS)
    assert job.request.ask_length == 0, "this engine is not asked"
    summary = run_job(job, out=tmp_path / "x", engine="transformers", shard_samples=4)
    assert (summary.committed, summary.asked.questions, summary.asked.too_long) == (9, 8, 1)
    assert (summary.asked.prompt_tokens, summary.asked.tokens) == (8 * 7, 8 * 2)
    for sample in hiddenlake.open_capture(tmp_path / "x").samples().to_pylist():
        word = None if sample["index"] == 4 else sample["answer"].split()[-(sample["index"] % 2)]
        assert sample["exact_answer"] == word and sample["exact_answer_valid"] == (word is not None)


def test_a_server_that_ends_stops_the_capture_which_goes_on_later(served, tiny_model, tmp_path):
    served.answers = [choose, choose, choose, choose, (401, "who are you")]
    job = plan_job(tiny_model, Task(ServedModel(served.url, "big")), **SETTINGS)
    with pytest.raises(CaptureError, match="401: who are you.*the same command goes on from there"):
        run_job(job, out=tmp_path / "x", engine="transformers", shard_samples=1)
    kept = len(hiddenlake.open_capture(tmp_path / "x"))
    assert 0 < kept < 9
    served.answers = [choose]
    summary = run_job(job, out=tmp_path / "x", engine="transformers", shard_samples=1)
    assert (summary.present, summary.committed) == (kept, 9 - kept)
