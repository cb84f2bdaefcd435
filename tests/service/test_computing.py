"""Get or compute: what is there is named, what is not is computed once, and what comes back is the model's own."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hiddenlake.cache.capture import capture
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.store.reader import open_capture

from .conftest import add_key, problem, write_capture
from .working import WorkerProcess, chat

pytestmark = pytest.mark.slow

CITIES = ("Kyoto", "Lagos", "Paris")


class CityTask:
    """A task that was captured before anybody served it."""

    name, rules = "cities", "none 1"
    questions = [Question(i, f"Which country is the city of {city} in?", ("?",)) for i, city in enumerate(CITIES)]

    def judge(self, question, answer):
        return Judgement(True, None)


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A lake with a capture of the tiny model's, and one of another's."""
    lake = tmp_path_factory.mktemp("computing") / "lake"
    lake.mkdir()
    capture(
        str(tiny_model), CityTask(), out=lake / "cities", engine="transformers", max_new_tokens=6, sites=["mlp_out"],
        positions=["last_q", "first_answer", "-1"], shard_samples=8,
    )  # fmt: skip
    other = {"model": "other", "weights": "sha256:0", "decoding": {"max_new_tokens": 4, "sampling": "greedy"}}
    write_capture(lake / "other", "cells", "bfloat16", "none", **other)
    return lake


@pytest.fixture(scope="module")
def served(place, tiny_model, tmp_path_factory):
    from .conftest import Served

    logs = tmp_path_factory.mktemp("logs")
    key = add_key(place, "tests", "admin")
    worker = WorkerProcess(place, tiny_model, logs / "worker")
    running = Served(place, logs / "server", key).start()
    worker.wait_ready()
    running.worker, running.model = worker, tiny_model
    yield running
    running.stop()
    assert worker.stop() == 0, worker.text()[-3000:]


def resolve(served, *inputs, wait=60, key=None, **fields):
    body = {"model": "tiny", "inputs": list(inputs), "wait": wait, **fields}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return served.http.post("/v1/activations:resolve", json=body, headers=headers)


def entries(response):
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["state"] == "complete" and body["job"] is None
    assert all(entry["state"] == "ready" for entry in body["entries"])
    return body["entries"]


def read(served, entry, **fields):
    """The activations of one entry, through the route."""
    from safetensors.numpy import load

    body = {"capture": entry["capture"], "samples": [entry["sample"]], **fields}
    response = served.http.post("/v1/activations:read", json=body)
    assert response.status_code == 200, response.text
    return load(response.content)


@pytest.fixture(scope="module")
def reference(tiny_model):
    """A function from token ids to {site: (layer, token, hidden)}, by hooks of its own, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    kept = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, y, i=i: kept.__setitem__(("mlp_out", i), y[0]))
        layer.register_forward_hook(
            lambda m, a, y, i=i: kept.__setitem__(("resid_post", i), (y if torch.is_tensor(y) else y[0])[0])
        )

    def run(ids):
        with torch.inference_mode():
            model(torch.tensor([list(ids)]))
        return {
            site: torch.stack([kept[site, i] for i in range(len(model.model.layers))]).numpy()
            for site in ("mlp_out", "resid_post")
        }

    run.tokenizer, run.model = AutoTokenizer.from_pretrained(tiny_model), model
    return run


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_a_miss_is_computed_and_then_a_hit(served, reference):
    question = chat("Which country is the city of Oslo in?")
    start = time.monotonic()
    [entry] = entries(resolve(served, question, generation={"max_new_tokens": 5}))
    computed = time.monotonic() - start
    assert entry["capture"].startswith("resolved-") and entry["sample"] == entry["key"]
    sample = served.http.get(f"/v1/captures/{entry['capture']}/samples/{entry['sample']}").json()
    ids = reference.tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, return_dict=False)
    assert sample["token_ids"][: sample["prompt_length"]] == list(ids)
    assert len(sample["token_ids"]) - len(ids) <= 5 and sample["correct"] is None
    expected = reference(sample["token_ids"])
    for site in ("mlp_out", "resid_post"):
        found = read(served, entry, site=site, dtype="float32")
        for p, position in enumerate(["-1", "first_answer", "last_q"]):
            token = sample["positions"][position]
            assert found["token_index"][p, 0] == token
            assert close(found["activations"][:, p, 0], expected[site][:, token])
    start = time.monotonic()
    for form in (question, {"token_ids": list(ids)}):
        assert entries(resolve(served, form, generation={"max_new_tokens": 5}, wait=0)) == [entry]
    assert time.monotonic() - start < computed


def test_part_of_what_is_there_is_a_hit_and_more_is_not(served):
    question, how = chat("Which country is the city of Lima in?"), {"max_new_tokens": 4}
    [entry] = entries(resolve(served, question, generation=how))
    for part in (
        {"layers": [1]},
        {"sites": ["resid_post"]},
        {"positions": ["last_q"]},
        {"sites": ["embed", "mlp_out"]},
    ):
        [found] = entries(resolve(served, question, generation=how, only_if_cached=True, **part))
        assert found == entry
    for other in ({"positions": ["last_q", "-2"]}, {"positions": ["all"]}):
        problem(resolve(served, question, generation=how, only_if_cached=True, **other), 404, "not_cached")
    problem(resolve(served, question, generation={"max_new_tokens": 3}, only_if_cached=True), 404, "not_cached")


def test_what_a_task_has_captured_is_a_hit(served):
    """Whoever captured it, and as whatever task."""
    found = entries(
        resolve(
            served,
            *(chat(q.question) for q in CityTask.questions),
            generation={"max_new_tokens": 6},
            sites=["mlp_out"],
            wait=0,
        )
    )
    assert [entry["capture"] for entry in found] == ["cities"] * 3
    assert [entry["sample"] for entry in found] == open_capture(served.lake / "cities").keys


def test_given_text_is_fed(served, reference):
    inputs = [
        {"text": "The capital of France is", "answer": " Paris, of course."},
        {"text": "Once upon a time there was a"},
    ]
    found = entries(resolve(served, *inputs, positions=["all", "last_q", "-1"]))
    for item, entry in zip(inputs, found, strict=True):
        prompt = reference.tokenizer(item["text"])["input_ids"]
        given = reference.tokenizer(item.get("answer", ""), add_special_tokens=False)["input_ids"]
        expected = reference([*prompt, *given])
        rows = read(served, entry, site="mlp_out", tokens="all")
        assert rows["token_index"].tolist() == list(range(len(prompt) + len(given)))
        assert close(rows["activations"], expected["mlp_out"])
        cells = read(served, entry, site="resid_post", positions=["last_q", "-1"])["activations"][:, :, 0]
        assert close(cells, expected["resid_post"][:, [len(prompt) - 1, -1]])


def test_drawn_answers_differ_and_are_drawn_once(served):
    question, how = chat("Name a city."), {"max_new_tokens": 8, "temperature": 1.0, "samples": 3, "seed": 7}
    found = entries(resolve(served, question, generation=how))
    texts = [served.http.get(f"/v1/captures/{e['capture']}/samples/{e['sample']}").json()["token_ids"] for e in found]
    assert [e["sample_index"] for e in found] == [0, 1, 2] and len({tuple(t) for t in texts}) == 3
    assert entries(resolve(served, question, generation=how, wait=0)) == found
    assert entries(resolve(served, question, generation=how | {"samples": 1}, wait=0)) == found[:1]
    others = entries(resolve(served, question, generation=how | {"seed": 8}))
    assert not {e["key"] for e in others} & {e["key"] for e in found}


def test_many_who_ask_at_once_are_answered_by_one_computation(served):
    before = len(served.http.get("/v1/captures").json()["captures"])
    inputs = [chat(f"What lies {i} miles north of the river?") for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda n: entries(resolve(served, *inputs[n % 4 :], generation={"max_new_tokens": 4})), range(16))
        )
    keys = {entry["key"] for found in answers for entry in found}
    assert len(keys) == 12
    for key in keys:
        assert len({json.dumps(e | {"input": 0}) for found in answers for e in found if e["key"] == key}) == 1
    assert len(served.http.get("/v1/captures").json()["captures"]) <= before + 1
    # one sample each: a key that was written twice would make the capture unreadable
    name = answers[0][0]["capture"]
    assert set(open_capture(served.lake / name).keys) >= keys


def test_a_job_is_followed_to_its_end(served):
    question = chat("Which river runs through Turin?")
    response = resolve(served, question, generation={"max_new_tokens": 60}, wait=0)
    assert response.status_code == 202
    body = response.json()
    assert body["state"] == "pending" and [e["state"] for e in body["entries"]] == ["pending"]
    assert response.headers["location"] == f"/v1/jobs/{body['job']}"
    with served.http.stream("GET", f"/v1/jobs/{body['job']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[0]["total"] == 1 and events[-1]["state"] == "done" and events[-1]["done"] == 1
    assert served.http.get(f"/v1/jobs/{body['job']}").json() == events[-1]
    assert served.http.get("/v1/jobs").json()["jobs"][0] == events[-1]
    assert entries(resolve(served, question, generation={"max_new_tokens": 60}, wait=0))


def test_who_may_read_only_gets_what_is_there(served):
    reader = add_key(served.lake, "reader")
    question = chat("Which country is the city of Pune in?")
    problem(resolve(served, question, generation={"max_new_tokens": 3}, key=reader), 403, "scope")
    [entry] = entries(resolve(served, question, generation={"max_new_tokens": 3}))
    assert entries(resolve(served, question, generation={"max_new_tokens": 3}, key=reader)) == [entry]
    job = served.http.get("/v1/jobs").json()["jobs"][0]["id"]
    theirs = {"Authorization": f"Bearer {reader}"}
    assert served.http.get("/v1/jobs", headers=theirs).json() == {"jobs": []}
    problem(served.http.get(f"/v1/jobs/{job}", headers=theirs), 404, "not_found")
    problem(served.http.get(f"/v1/jobs/{job}/events", headers=theirs), 404, "not_found")


def test_tenants_do_not_learn_of_each_other(served):
    one, two = (add_key(served.lake, name, "compute", tenant=name) for name in ("one", "two"))
    question, how = chat("What is the secret of the house?"), {"max_new_tokens": 3}
    [mine] = entries(resolve(served, question, generation=how, key=one))
    problem(resolve(served, question, generation=how, key=two, only_if_cached=True), 404, "not_cached")
    problem(resolve(served, question, generation=how, only_if_cached=True), 404, "not_cached")
    headers = {"Authorization": f"Bearer {two}"}
    for path in (f"/v1/captures/{mine['capture']}", f"/v1/zarr/{mine['capture']}/zarr.json"):
        problem(served.http.get(path, headers=headers), 404, "not_found")
    [theirs] = entries(resolve(served, question, generation=how, key=two))
    assert theirs["capture"] != mine["capture"] and theirs["key"] == mine["key"]
    # what is everybody's is a hit for all
    [shared] = entries(
        resolve(
            served, chat(CityTask.questions[0].question), generation={"max_new_tokens": 6}, sites=["mlp_out"], key=two
        )
    )
    assert shared["capture"] == "cities"


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "nobody"}, 404, "no_model"),
        ({"model": None}, 409, "which_model"),
        ({"sites": ["attn_out"]}, 422, "bad_input"),
        ({"layers": [99]}, 422, "bad_input"),
        ({"positions": ["exact_answer_last"]}, 422, "bad_input"),
        ({"positions": ["nowhere"]}, 422, "bad_input"),
        ({"generation": {"max_new_tokens": 65}}, 413, "too_long"),
        ({"generation": {"samples": 2}}, 422, "bad_input"),
        ({"generation": {"samples": 1000, "temperature": 1, "max_new_tokens": 64}, "inputs": [{"text": "a"}] * 2}, 413, "too_many_inputs"),
        ({"inputs": [{"text": "word " * 200}]}, 413, "too_long"),
        ({"inputs": [{"token_ids": [49152]}]}, 422, "bad_input"),
        ({"inputs": [{"text": "a", "token_ids": [1]}]}, 422, "bad_input"),
        ({"inputs": [{"messages": [{"role": "nobody", "content": "x"}]}], "generation": None, "only_if_cached": True}, 404, "not_cached"),
        ({"inputs": []}, 422, "bad_input"),
        ({"inputs": [{"text": "a", "answer": "b"}], "generation": {}}, 422, "bad_input"),
        ({"wait": float("inf")}, 422, "bad_input"),
        ({"unknown": 1}, 422, "bad_input"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_words(served, fields, status, kind):
    body = {"model": "tiny", "inputs": [chat("never computed before")], "generation": {"max_new_tokens": 2}, **fields}
    content = json.dumps(body)
    response = served.http.post(
        "/v1/activations:resolve", content=content, headers={"content-type": "application/json"}
    )
    found = problem(response, status, kind)
    assert "never computed" not in response.text and "word word" not in response.text
    assert found["remedy"]


def test_models_are_listed(served):
    models = {model["name"]: model for model in served.http.get("/v1/models").json()["models"]}
    assert models["tiny"]["live"] and models["tiny"]["sites"] == ["mlp_out", "resid_post"]
    assert len(models) == 2


def test_metrics_count_hits_misses_and_what_was_computed(served):
    def metrics():
        lines = [line.split() for line in served.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = metrics()
    question = chat("Which is the longest river of Peru?")
    entries(resolve(served, question, generation={"max_new_tokens": 4}))
    entries(resolve(served, question, generation={"max_new_tokens": 4}))
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["hiddenlake_resolve_misses_total"] == 1 and grown["hiddenlake_resolve_hits_total"] == 1
    assert grown["hiddenlake_computed_answers_total"] == 1 and grown["hiddenlake_computed_tokens_total"] > 10
    assert grown["hiddenlake_computed_bytes_total"] > 1000 and grown["hiddenlake_computed_wait_seconds_total"] > 0
    assert after["hiddenlake_workers"] == 1 and after['hiddenlake_queue{state="pending"}'] == 0


def test_pins_hold_and_captures_are_removed(served, tmp_path):
    shutil.copytree(served.lake / "other", served.lake / "spare")
    assert served.http.put("/v1/captures/spare/pin").status_code == 204
    problem(served.http.delete("/v1/captures/spare"), 409, "pinned")
    assert served.http.delete("/v1/captures/spare/pin").status_code == 204
    assert served.http.delete("/v1/captures/spare").status_code == 204
    problem(served.http.get("/v1/captures/spare"), 404, "not_found")
    assert not (served.lake / "spare").exists()
    reader = {"Authorization": f"Bearer {add_key(served.lake, 'remover', 'compute')}"}
    problem(served.http.delete("/v1/captures/other", headers=reader), 403, "scope")


def test_a_stopped_worker_finishes_what_it_has(served, tiny_model, tmp_path):
    """SIGTERM: nothing that it holds waits for its lease to end, and nothing is lost."""
    other = WorkerProcess(served.lake, tiny_model, tmp_path / "log").wait_ready()
    done = []
    asking = threading.Thread(
        target=lambda: done.append(
            resolve(served, *(chat(f"What is {i} times two?") for i in range(60)), generation={"max_new_tokens": 30})
        )
    )
    asking.start()
    time.sleep(1.0)
    assert other.stop() == 0, other.text()[-2000:]
    asking.join()
    assert len(entries(done[0])) == 60


def test_a_client_resolves_and_reads(served):
    import asyncio

    import hiddenlake

    texts = ["The river Po runs through", "The river Ebro runs through"]
    asked = {"model": "tiny", "layers": [0, 2], "positions": ["last_q", -2]}
    with hiddenlake.connect(served.url, served.key) as lake:
        with pytest.raises(hiddenlake.HiddenlakeError, match="2 of 2 answers are not there"):
            lake.resolve(texts, only_if_cached=True, **asked)
        found = lake.resolve([texts[0], {"text": texts[1]}], **asked)
        assert [entry.input for entry in found.entries] == [0, 1] and found.layers == (0, 2)
        [name] = {entry.capture for entry in found.entries}
        capture = lake.capture(name)
        rows = capture.read("mlp_out", 2, "last_q", [entry.sample for entry in found.entries])
        assert rows.shape == (2, 128) and np.isfinite(rows).all()
        prompts = capture.samples().to_pylist()
        assert {row["prompt"] for row in prompts} >= set(texts)
        chats = lake.resolve([chat("Name a river.")["messages"]], generation={"max_new_tokens": 3}, **asked)
        assert len(chats.entries) == 1
        with pytest.raises(hiddenlake.HiddenlakeError, match="still being computed after 0 seconds"):
            lake.resolve(["A text that nobody has asked about yet"], patience=0.0, **asked)
        with pytest.raises(hiddenlake.HiddenlakeError, match="there is no such model"):
            lake.resolve(texts, model="nobody")

    async def again():
        async with hiddenlake.connect_async(served.url, served.key) as lake:
            return await lake.resolve(texts, only_if_cached=True, **asked)

    assert asyncio.run(again()) == found


def test_a_worker_that_does_not_finish_in_time_leaves_its_work_to_others(served, tiny_model, tmp_path):
    lake = tmp_path / "lake"
    lake.mkdir()
    key = add_key(lake, "tests", "admin")
    from .conftest import Served

    server = Served(lake, tmp_path / "server", key, ("--lease", "60")).start()
    slow = WorkerProcess(lake, tiny_model, tmp_path / "slow", "--drain", "0.2", "--lease", "60").wait_ready()
    try:
        body = {"inputs": [chat(f"Count to {i}.") for i in range(40)], "generation": {"max_new_tokens": 64}}
        job = server.http.post("/v1/activations:resolve", json=body).json()["job"]
        while not server.http.get(f"/v1/jobs/{job}").json()["leased"]:
            time.sleep(0.02)
        assert slow.stop() == 75
        other = WorkerProcess(lake, tiny_model, tmp_path / "other").wait_ready()
        assert server.http.post("/v1/activations:resolve", json=body | {"wait": 60}).status_code == 200
        assert other.stop() == 0
    finally:
        server.stop()
        slow.process.kill()


def test_a_probe_scores_prompts_that_nobody_has_captured(served):
    from hiddenlake.probing.probe import Probe

    identity = open_capture(served.lake / "cities").identity
    coef = np.random.default_rng(0).normal(size=128)
    probe = Probe(
        site="mlp_out", layer=1, position="last_q", label="correct", positive_class="wrong", identity=identity,
        coef=coef, intercept=0.25, fit={},
    )  # fmt: skip
    (served.lake / "probes").mkdir()
    probe.save(served.lake / "probes" / "known.safetensors")
    inputs = [chat("Which country is the city of Bergen in?"), chat(CityTask.questions[1].question)]
    how = {"generation": {"max_new_tokens": 6}}
    post = lambda **more: served.http.post("/v1/probes/known:resolve", json={"inputs": inputs, **how, **more})
    problem(post(only_if_cached=True), 404, "not_cached")
    found = post(wait=60)
    assert found.status_code == 200, found.text
    body = found.json()
    assert body["positive_class"] == "wrong" and [s["input"] for s in body["scores"]] == [0, 1]
    assert [s["capture"] == "cities" for s in body["scores"]] == [False, True]
    for score in body["scores"]:
        x = read(served, score, site="mlp_out", layers=[1], positions=["last_q"])["activations"].ravel()
        assert score["score"] == pytest.approx(float(x.astype(np.float64) @ coef + 0.25), rel=1e-6)
        assert score["probability"] == pytest.approx(1 / (1 + np.exp(-score["score"])))
    assert post(only_if_cached=True).json() == body
    assert (
        served.http.post("/v1/probes/known:resolve", json={"inputs": [chat("And where is Narvik?")]}).status_code == 202
    )
