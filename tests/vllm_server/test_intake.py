"""What a request may ask for, and what a server without our command is: nothing here needs an engine."""

from argparse import Namespace
from dataclasses import replace

import pytest

from hiddenlake.cache.errors import BadInputError, HiddenlakeError
from hiddenlake.cache.model import load_model
from hiddenlake.cache.store.writer import open_writer
from hiddenlake.cache.vllm_server.intake import Intake, Offer
from hiddenlake.cache.vllm_server.states import Asked, State, States


@pytest.fixture
def offer(tiny_model, tmp_path):
    return Offer(
        lake=tmp_path,
        model=load_model(tiny_model, "float32"),
        sites=("mlp_out", "resid_post"),
        layers=(0, 2),
        positions=("last_q", "-1"),
        row_bytes=1000,
        max_request_bytes=50_000,
        buffer_bytes=64 << 20,
        shard_samples=8,
    )


def ask(intake: Intake, answers: int = 1, max_tokens: int = 10, prompt: int = 5, **args: object):
    named = {f"hiddenlake_{name}": value for name, value in args.items() if name != "capture"}
    return intake.ticket({"hiddenlake": args.get("capture", "a"), **named}, range(prompt), answers, max_tokens)


def test_what_is_not_named_is_what_is_there_and_else_what_is_tapped(offer):
    intake = Intake(offer)
    first = ask(intake).coverage
    assert (first.sites, first.layers, first.positions) == (("mlp_out", "resid_post"), (0, 2), ("last_q", "-1"))
    small = ask(intake, capture="b", sites="mlp_out", layers=2, positions=["mean_answer", "all_generated/2"]).coverage
    assert (small.sites, small.layers, small.positions, str(small.tokens)) == (
        ("mlp_out",), (2,), ("mean_answer",), "all_generated/2",
    )  # fmt: skip
    assert ask(intake, capture="b").coverage == small
    assert ask(intake, capture="b", layers=["-1"]).coverage == small
    with pytest.raises(BadInputError, match=r"coverage layers is \[2\], asked for \[0, 2\]"):
        ask(intake, capture="b", layers=[0, 2])


def test_a_site_without_layers_alone(offer):
    coverage = ask(Intake(replace(offer, sites=("mlp_out", "final_norm"))), sites=["final_norm"]).coverage
    assert (coverage.sites, coverage.layers) == (("final_norm",), ())


def test_the_capture_on_disk_counts_after_a_restart(offer):
    _, coverage = Intake(offer).coverage({"hiddenlake": "a", "hiddenlake_positions": ["-1"]})
    path, identity = offer.lake / "a", offer.identity.to_json()
    open_writer(path, identity=identity, coverage=coverage, provenance={}, planned=1).close()
    again = Intake(offer)
    assert ask(again).coverage == coverage
    with pytest.raises(BadInputError, match="coverage positions is"):
        ask(again, positions=["last_q"])
    with pytest.raises(BadInputError, match="identity judge is 'none', asked for 'mine 1'"):
        ask(Intake(replace(offer, rules="mine 1")))


def test_keys_never_repeat_and_requests_are_numbered_by_capture(offer):
    intake = Intake(offer)
    tickets = [ask(intake, answers=2) for _ in range(3)] + [ask(intake, capture="b")]
    assert len({key for ticket in tickets for key in ticket.keys}) == 7
    assert [ticket.number for ticket in tickets] == [0, 1, 2, 0]


def test_the_limit_is_on_all_rows_that_may_have_to_wait(offer):
    intake = Intake(offer)
    # last_q, the last prompt token that -1 may mean (the same one), and every answer token
    assert ask(intake, max_tokens=49)
    with pytest.raises(BadInputError, match="51000 bytes would have to wait for this request, but one may take 50000"):
        ask(intake, max_tokens=50)
    with pytest.raises(BadInputError, match="52000 bytes"):
        ask(intake, max_tokens=25, answers=2)
    with pytest.raises(BadInputError, match="bytes would have to wait"):  # as long as the context allows
        ask(intake, max_tokens=None)
    assert ask(intake, capture="b", positions=["last_q"], max_tokens=None, prompt=200, answers=50)


def test_what_the_worker_is_told(offer):
    params = Namespace(extra_args={"hiddenlake": "a", "other": 1}, logprobs=None)
    one, two = ask(Intake(offer)), ask(Intake(offer), answers=2, positions=["last_q", "all_prompt"])
    prepared = one.prepare(params)
    assert prepared.extra_args == {
        "other": 1,
        "hiddenlake": one.keys[0],
        "hiddenlake_positions": ["last_q", "-1"],
        "hiddenlake_last_token": 1,
    }
    assert (prepared.logprobs, prepared.skip_reading_prefix_cache) == (0, True)
    assert params == Namespace(extra_args={"hiddenlake": "a", "other": 1}, logprobs=None), (
        "the caller's stay as they are"
    )
    told = two.prepare(params).extra_args
    assert told["hiddenlake"] == list(two.keys)
    assert told["hiddenlake_positions"] == ["last_q", "all_prompt"] and told["hiddenlake_last_token"] == 0
    assert one.prepare(params, feed_last=False).extra_args["hiddenlake_last_token"] == 0


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", "a\0", "a b", "ä", "x" * 129, 7, None, ["a"]])
def test_names_that_are_no_names(name, offer):
    with pytest.raises(BadInputError, match="must name a capture"):
        Intake(offer).coverage({"hiddenlake": name})


@pytest.mark.parametrize("values", [[1.5], {"a": 1}, [["x"]], [None], []])
def test_values_that_are_no_lists_of_names(values, offer):
    for argument in ("sites", "layers", "positions"):
        with pytest.raises(HiddenlakeError):
            Intake(offer).coverage({"hiddenlake": "a", f"hiddenlake_{argument}": values})


def test_states():
    states = States()
    states.begin(Asked("chatcmpl-x", "a", ("1", "2", "3")), ["chatcmpl-x", "x"])
    assert states.get("1") == State("pending", "a") and states.get("4") is None
    states.commit(["1"])
    states.fail(["1", "2", "4"], "gone")
    assert states.get("1") == State("committed", "a"), "what is committed stays so"
    assert states.get("2") == State("failed", "a", "gone")
    assert states.counts() == {"pending": 1, "committed": 1, "failed": 1}
    assert states.failures() == {"2": "gone"}
    assert [asked.keys for asked in states.of_request("x")] == [("1", "2", "3")]


@pytest.mark.vllm
def test_a_server_that_was_not_started_by_our_command_has_no_routes():
    from fastapi import FastAPI

    from hiddenlake.cache.vllm_server.routes import Plugin

    app = FastAPI()
    before = list(app.routes)
    app.state.args = Namespace()
    Plugin().attach_router(app)
    assert app.routes == before
    app.state.args.hiddenlake = None
    Plugin().attach_router(app)
    added = {route.path for route in app.routes} - {route.path for route in before}
    assert added and all(path.startswith("/v1/hiddenlake") for path in added), "under /v1, where vLLM asks for its key"
