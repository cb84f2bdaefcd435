"""vLLM's OpenAI server: captured and ordinary requests side by side, whatever a client asks and however it leaves."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.positions import POOLED, span_of

from ..engine.conftest import relative_error
from .conftest import WAIT_SECONDS, Server, events

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CITIES = ("Oslo", "Lima", "Porto", "Cairo", "Quito", "Hanoi", "Turin", "Leeds", "Kyoto", "Lagos", "Paris", "Pune")

TAPPED = [0, 5, 10, 11, 12, 29]


def question(city: str) -> str:
    return f"Which country is the city of {city} in?"


def check(server: Server, name: str, keys: Sequence[str], reference: Callable) -> list[dict]:
    """Every stored cell and token of these samples is what Hugging Face computes for their ids. Returns their rows."""
    capture = hiddenlake.open_capture(server.lake / name)
    rows = {row["key"]: row for row in capture.samples().to_pylist()}
    coverage = capture.coverage
    for key in keys:
        row = rows[key]
        expected = reference(row["token_ids"])
        q, n = row["prompt_length"], row["total_length"]
        for site in (*coverage.sites, "embed"):
            values = expected[site] if site == "embed" else expected[site][list(coverage.layers)]
            stored = capture.read(site, samples=key)
            for p, (position, token) in enumerate(zip(coverage.positions, row["token_index"], strict=True)):
                found = stored[..., p, :]
                if token == POOLED:
                    span = span_of(position, q, n, None)
                    assert relative_error(found, values[..., span.start : span.stop, :].mean(-2)).max() <= 1e-4
                elif token >= 0:
                    assert relative_error(found, values[..., token, :]).max() <= 1e-4, (site, position)
                else:
                    assert np.isnan(found).all()
            if coverage.tokens is not None:
                tokens = coverage.tokens.indices(q, n)
                found = capture.read_tokens(site, samples=key).values
                assert found.shape[-2] == len(tokens)
                assert relative_error(found, values[..., list(tokens), :]).max() <= 1e-4
    return [rows[key] for key in keys]


def free(server: Server) -> bool:
    """Whether the workers hold no sample's rows."""
    deadline = time.monotonic() + WAIT_SECONDS
    while any(worker["books"] for worker in server.facts()["workers"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return all(worker["books"] == 0 for worker in server.facts()["workers"])


def test_captured_and_ordinary_requests_in_one_batch(server, reference):
    """Only what asks for it is captured; nobody's answer changes."""

    def ask(i: int, capture: str | None) -> dict:
        response = server.chat(question(CITIES[i]), capture, logprobs=True, top_logprobs=2, max_tokens=12)
        return response.raise_for_status().json()

    with ThreadPoolExecutor(len(CITIES)) as pool:
        plain = list(pool.map(lambda i: ask(i, None), range(len(CITIES))))
        mixed = list(pool.map(lambda i: ask(i, "mixed" if i % 2 else None), range(len(CITIES))))
    for i, (before, after) in enumerate(zip(plain, mixed, strict=True)):
        assert before["choices"][0]["message"] == after["choices"][0]["message"]
        tokens = [[step["token"] for step in answer["choices"][0]["logprobs"]["content"]] for answer in (before, after)]
        assert tokens[0] == tokens[1]
        assert (after["kv_transfer_params"] is not None) == bool(i % 2)
    keys = [answer["kv_transfer_params"]["hiddenlake"]["keys"][0] for answer in mixed[1::2]]
    assert [state["state"] for state in server.states(keys)] == ["committed"] * len(keys)
    capture = hiddenlake.open_capture(server.lake / "mixed")
    assert sorted(capture.keys) == sorted(keys), "ordinary requests are not captured"
    assert capture.coverage.positions == ("last_q", "first_answer", "-1")
    rows = check(server, "mixed", keys, reference)
    for city, row, answer in zip(CITIES[1::2], rows, mixed[1::2], strict=True):
        assert city in row["prompt"] and row["answer"] == answer["choices"][0]["message"]["content"]
        logprobs = [step["logprob"] for step in answer["choices"][0]["logprobs"]["content"]]
        np.testing.assert_allclose(row["logprobs"][: len(logprobs)], logprobs, atol=1e-5)
    assert free(server)


def test_several_answers_keep_their_order(server, reference):
    """Some sites, layers, pooled positions and tokens of what is tapped; each key is its own answer's."""
    xargs = {
        "hiddenlake_sites": ["resid_post"],
        "hiddenlake_layers": [10, 11, 29],
        "hiddenlake_positions": ["last_q", "-1", "mean_answer", "mean_all", "all_generated"],
    }
    response = server.complete("The capital of France is", "several", n=3, temperature=0.9, seed=5, xargs=xargs)
    keys = server.committed(response)
    assert len(set(keys)) == 3
    rows = check(server, "several", keys, reference)
    assert [row["answer"] for row in rows] == [choice["text"] for choice in response.json()["choices"]]
    assert len({row["answer"] for row in rows}) > 1, "or the order would prove nothing"
    assert [(row["index"], row["sample_index"]) for row in rows] == [(0, 0), (0, 1), (0, 2)]
    coverage = hiddenlake.open_capture(server.lake / "several").coverage
    assert (coverage.sites, coverage.layers) == (("resid_post",), (10, 11, 29))


def test_streams_are_asked_for_by_their_request(server, reference):
    response = server.chat(
        question("Rome"), "streams", stream=True, n=2, temperature=0.7, headers={"X-Request-Id": "mine"}
    )
    texts = ["", ""]
    for event in events(response):
        assert event["id"] == "chatcmpl-mine"
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    for name in ("mine", "chatcmpl-mine"):
        asked = server.http.get(f"/v1/hiddenlake/requests/{name}").raise_for_status().json()
        assert asked["capture"] == "streams"
    [keys] = asked["keys"]
    assert [state["state"] for state in server.states(keys)] == ["committed"] * 2
    assert [row["answer"] for row in check(server, "streams", keys, reference)] == texts


def test_several_prompts_of_one_request(server, reference):
    """The response names the first prompt's samples, the route all of them; an id that was used twice names none."""
    response = server.complete(["Lima is in", "Oslo is in"], "prompts", headers={"X-Request-Id": "two"})
    asked = server.http.get("/v1/hiddenlake/requests/two").raise_for_status().json()
    first, second = asked["keys"]
    assert response.json()["kv_transfer_params"]["hiddenlake"]["keys"] == first
    assert [state["state"] for state in server.states(first + second)] == ["committed"] * 2
    assert [row["prompt"] for row in check(server, "prompts", first + second, reference)] == [
        "Lima is in",
        "Oslo is in",
    ]
    server.complete("Pune is in", "prompts", headers={"X-Request-Id": "two"}).raise_for_status()
    assert server.http.get("/v1/hiddenlake/requests/two").status_code == 409
    assert server.http.get("/v1/hiddenlake/requests/three").status_code == 404


def test_a_stop_string_leaves_its_token_an_activation(server, reference):
    """vLLM's frontend finds it, and the engine never feeds the token that completed it."""
    plain = server.chat(question("Oslo"), max_tokens=24).raise_for_status().json()
    text = plain["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][1:4]
    for stream in (False, True):
        headers = {"X-Request-Id": f"stop-{stream}"}
        response = server.chat(question("Oslo"), "stop", stop=[stop], max_tokens=24, stream=stream, headers=headers)
        response.raise_for_status()
        [[key]] = server.http.get(f"/v1/hiddenlake/requests/stop-{stream}").json()["keys"]
        assert server.states([key])[0]["state"] == "committed"
        [row] = check(server, "stop", [key], reference)
        assert row["finish_reason"] == "stop" and row["answer"] == text[: text.index(stop)]
        assert row["token_index"][-1] == row["total_length"] - 1


def test_structured_output_stays_what_it_was(server, reference):
    schema = {"type": "object", "properties": {"country": {"type": "string", "maxLength": 12}}, "required": ["country"]}
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        "max_tokens": 40,
    }
    plain = server.chat(question("Lima"), **fields).raise_for_status().json()
    captured = server.chat(question("Lima"), "structured", **fields)
    assert captured.json()["choices"][0]["message"] == plain["choices"][0]["message"]
    [row] = check(server, "structured", server.committed(captured), reference)
    assert json.loads(row["answer"]).keys() == {"country"}


def test_a_client_that_leaves_frees_its_rows(server):
    before = server.facts()["samples"]
    body = {"model": server.model, "messages": [{"role": "user", "content": question("Oslo")}], "stream": True}
    body |= {"max_tokens": 200, "ignore_eos": True, "vllm_xargs": {"hiddenlake": "left"}}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Request-Id": "left"}) as response:
        lines = response.iter_lines()  # the connection ends with it
        for _ in range(4):
            next(lines)
        assert any(worker["books"] for worker in server.facts()["workers"]), "its rows are held while it is there"
    [[key]] = server.http.get("/v1/hiddenlake/requests/left").json()["keys"]
    [state] = server.states([key])
    assert (state["state"], state["cause"]) == ("failed", "the request ended before its answer did")
    assert free(server)
    assert server.facts()["samples"] == before | {"failed": before["failed"] + 1}


def test_rows_beyond_the_ring_are_spilled(server, reference):
    """Eight answers of 100 tokens, all of which may be meant, and a ring of 534 rows."""

    def ask(i: int) -> list[str]:
        xargs = {"hiddenlake_positions": ["first_answer", "-1", "-90"]}
        response = server.chat(question(CITIES[i]), "spill", max_tokens=100, ignore_eos=True, xargs=xargs)
        return server.committed(response)

    with ThreadPoolExecutor(8) as pool:
        keys = [key for keys in pool.map(ask, range(8)) for key in keys]
    check(server, "spill", keys, reference)
    assert server.facts()["workers"][0]["spilled"] > 0


def test_a_capture_that_cannot_be_written_never_stops_an_answer(server):
    (server.lake / "blocked").mkdir()
    (server.lake / "blocked" / "file").write_text("someone else's")
    response = server.chat(question("Oslo"), "blocked").raise_for_status().json()
    assert response["choices"][0]["message"]["content"]
    [state] = server.states(response["kv_transfer_params"]["hiddenlake"]["keys"])
    assert state["state"] == "failed" and "is no capture" in state["cause"]
    assert free(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("capture", "xargs", "sentence"),
    [
        ("../up", {}, "must name a capture"),
        (".hidden", {}, "must name a capture"),
        ("a/b", {}, "must name a capture"),
        ("x" * 200, {}, "must name a capture"),
        (None, {"hiddenlake_positions": ["-1"]}, "must name a capture"),
        (
            "bad",
            {"hiddenlake_sites": ["attn_out"]},
            "attn_out is not tapped by this server: it taps mlp_out, resid_post",
        ),
        ("bad", {"hiddenlake_sites": ["nonsense"]}, "unknown site 'nonsense'"),
        ("bad", {"hiddenlake_layers": [4]}, "layers [4] are not tapped by this server"),
        ("bad", {"hiddenlake_layers": ["many"]}, "unknown layers 'many'"),
        ("bad", {"hiddenlake_layers": [1.5]}, "hiddenlake_layers must be a list of names or whole numbers"),
        ("bad", {"hiddenlake_positions": []}, "hiddenlake_positions must be a list"),
        ("bad", {"hiddenlake_positions": ["exact_answer_first"]}, "nobody judges these answers"),
        ("bad", {"hiddenlake_positions": ["mean_exact_answer"]}, "nobody judges these answers"),
        ("bad", {"hiddenlake_positions": [str(-k) for k in range(1, 2000)]}, "the buffer may take 256.0 MiB"),
        ("bad", {"hiddenlake_tail": 1}, "unknown argument hiddenlake_tail"),
        (None, {"hiddenlake_last_token": 1}, "unknown argument hiddenlake_last_token"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_generated(server, capture, xargs, sentence, stream):
    before = server.facts()["samples"]
    response = server.chat(question("Oslo"), capture, xargs=xargs, stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "BadRequestError" and error["param"] == "vllm_xargs" and sentence in error["message"]
    assert "Oslo" not in response.text
    assert server.facts()["samples"] == before and not (server.lake / "bad").exists()


def test_a_request_may_take_so_much_and_no_more(server):
    # what is known to lie in the prompt needs no room for the answer
    server.committed(
        server.chat(question("Oslo"), "prompts_only", max_tokens=300, xargs={"hiddenlake_positions": ["last_q"]})
    )
    response = server.chat(question("Oslo"), "answers", max_tokens=300)
    assert response.status_code == 400
    assert "would have to wait for this request, but one may take 8000000" in response.json()["error"]["message"]


def test_a_request_with_other_coverage_is_refused_by_field(server):
    server.committed(
        server.chat(question("Oslo"), "fixed", xargs={"hiddenlake_layers": [5], "hiddenlake_positions": ["-1"]})
    )
    for xargs, field in [
        ({"hiddenlake_layers": [0, 5]}, "coverage layers is [5], asked for [0, 5]"),
        ({"hiddenlake_sites": ["mlp_out"]}, "coverage sites is ['mlp_out', 'resid_post'], asked for ['mlp_out']"),
        ({"hiddenlake_positions": ["last_q"]}, "coverage positions is ['-1'], asked for ['last_q']"),
    ]:
        response = server.chat(question("Oslo"), "fixed", xargs=xargs)
        assert response.status_code == 400 and field in response.json()["error"]["message"]
    # who names nothing gets what is there
    server.committed(server.chat(question("Lima"), "fixed"))


def test_captures_of_another_model_are_refused(server, tiny_model):
    from hiddenlake.cache.model import load_model
    from hiddenlake.cache.store.writer import open_writer
    from hiddenlake.cache.vllm_server.intake import Intake, Offer

    model = load_model(tiny_model, "float32")
    offer = Offer(server.lake, model, ("mlp_out",), (0,), ("-1",), 1, None, 1 << 30, 8)
    name, coverage = Intake(offer).coverage({"hiddenlake": "foreign"})
    open_writer(
        server.lake / name, identity=offer.identity.to_json(), coverage=coverage, provenance={}, planned=1
    ).close()
    response = server.chat(question("Oslo"), "foreign")
    assert response.status_code == 400
    assert (
        f"identity model is '{tiny_model.name}', asked for '{server.facts()['model']}'"
        in response.json()["error"]["message"]
    )


def test_routes_check_their_parameters(server):
    assert server.http.get("/v1/hiddenlake/samples/" + "0" * 32).status_code == 404
    for path in ("samples/x", "samples/" + "0" * 33, "samples/..%2f..%2fzarr.json", f"samples/{'0' * 32}?wait=-1"):
        assert server.http.get(f"/v1/hiddenlake/{path}").status_code in (400, 404), path
    assert server.http.get(f"/v1/hiddenlake/samples/{'0' * 32}?wait=1e9").status_code == 400
    facts = server.facts()
    assert (facts["sites"], facts["layers"]) == (["mlp_out", "resid_post"], TAPPED)


def test_flush_publishes_at_once(server):
    response = server.chat(question("Oslo"), "flushed").raise_for_status().json()
    [key] = response["kv_transfer_params"]["hiddenlake"]["keys"]
    server.http.post("/v1/hiddenlake/flush").raise_for_status()
    assert server.http.get(f"/v1/hiddenlake/samples/{key}").json()["state"] == "committed"


def test_a_killed_server_goes_on_where_it_was(server, reference):
    """Also with an API key, which our routes ask for as vLLM's do. Last of the file: the server is another one then."""
    first = server.committed(server.chat(question("Oslo"), "kept"))
    second = server.committed(server.chat(question("Oslo"), "kept"))
    lost = server.chat(question("Oslo"), "kept").raise_for_status().json()["kv_transfer_params"]["hiddenlake"]["keys"]
    server.kill()
    server.start("--api-key", "secret")
    for path in ("", "/samples/" + first[0], "/requests/x"):
        assert server.http.get(f"/v1/hiddenlake{path}").status_code == 401
    assert server.http.post("/v1/hiddenlake/flush").status_code == 401
    server.http.headers["Authorization"] = "Bearer secret"
    assert [state["state"] for state in server.states(first + second)] == ["committed"] * 2
    assert server.http.get(f"/v1/hiddenlake/samples/{lost[0]}").status_code == 404
    third = server.committed(server.chat(question("Oslo"), "kept"))
    assert len({*first, *second, *lost, *third}) == 4, "the same prompt is another sample each time"
    rows = check(server, "kept", first + second + third, reference)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert len({row["group"] for row in rows}) == 1
    refused = server.chat(question("Oslo"), "kept", xargs={"hiddenlake_layers": [5]})
    assert refused.status_code == 400 and "coverage layers" in refused.json()["error"]["message"]


def test_no_prompt_reaches_the_log(server):
    log = server.log.read_text()
    assert "Application startup complete" in log
    assert not [city for city in CITIES if city in log]
