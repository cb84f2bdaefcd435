"""What differs between versions of vLLM: what was not tested is refused, and the last token is held back in each."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from hiddenlake.cache.engines import vllm_setup as setup
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.worker.plan import LAST_TOKEN_ARG
from hiddenlake.cache.worker.scheduler import _LastTokenMixin

pytestmark = pytest.mark.vllm


def test_an_untested_version_is_refused():
    with pytest.raises(CaptureError, match="vLLM 0.25.1 was not tested: install 0.32.0"):
        setup.check_version("0.25.1")


def test_an_untested_runner_is_refused(monkeypatch):
    config = SimpleNamespace(use_v2_model_runner=True)
    with pytest.raises(CaptureError, match="only on V1: start it with VLLM_USE_V2_MODEL_RUNNER=0"):
        setup.check_runner(config)
    monkeypatch.setitem(setup.TESTED_VERSIONS, "0.32.0", {"V2": "CUDA", "V1": "CPU"})
    setup.check_runner(config)


@pytest.mark.parametrize(("runners", "chosen"), [(("V1",), "0"), (("V1", "V2"), "0"), (("V2", "V1"), "1")])
def test_the_first_tested_runner_is_used(runners, chosen, monkeypatch):
    monkeypatch.setitem(setup.TESTED_VERSIONS, "0.32.0", dict.fromkeys(runners, "here"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # so that it is as before in the end
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    setup.choose_environment()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == chosen
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    setup.choose_environment()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


class _Base:
    """What a scheduler does with a step's tokens: it stops at the third, and settles what was counted ahead."""

    max_model_len = 100
    _runner_output = SimpleNamespace(logprobs=None)

    def settle(self, request, tokens):
        request.tokens += tokens
        request.num_tokens += len(tokens)
        request.num_output_placeholders -= len(tokens)
        if stopped := len(request.tokens) >= 3:
            request.status, request.stop_reason = "FINISHED", 7
        return tokens, stopped


class _Scheduler025(_Base):
    def _update_request_with_output(self, request, new_token_ids):
        if request.async_tokens_to_discard:
            request.async_tokens_to_discard -= 1
            return [], False
        return self.settle(request, new_token_ids)


class _Scheduler032(_Base):
    def _update_request_with_output(self, request, new_token_ids, is_stale=False):
        return self.settle(request, new_token_ids)


def make(base):
    scheduler = type("Scheduler", (_LastTokenMixin, base), {"__init__": lambda self: None})()
    request = SimpleNamespace(
        tokens=[], num_tokens=5, num_computed_tokens=5, num_output_placeholders=1, status="RUNNING", stop_reason=None,
        sampling_params=SimpleNamespace(extra_args={LAST_TOKEN_ARG: 1}, num_logprobs=None),
    )  # fmt: skip
    if base is _Scheduler025:
        request.async_tokens_to_discard = 0
    return scheduler, request


def step(scheduler, request, token, **stale):
    request.num_computed_tokens += 1
    request.num_output_placeholders += 1
    return scheduler._update_request_with_output(request, [token], **stale)


@pytest.mark.parametrize(("base", "stale"), [(_Scheduler025, {}), (_Scheduler032, {"is_stale": False})])
def test_the_last_token_is_held_back_for_one_step(base, stale):
    scheduler, request = make(base)
    request.num_computed_tokens = 4
    request.num_output_placeholders = 0
    assert step(scheduler, request, 11, **stale) == ([11], False)
    assert step(scheduler, request, 12, **stale) == ([12], False)
    assert step(scheduler, request, 13, **stale) == ([], False)
    assert request.status == "RUNNING"
    assert step(scheduler, request, 99, **stale) == ([13], True)
    assert (request.status, request.stop_reason, request.tokens) == ("FINISHED", 7, [11, 12, 13])
    assert request.num_output_placeholders == 0


def test_what_is_to_be_discarded_does_not_count_as_the_extra_step():
    scheduler, request = make(_Scheduler025)
    request.num_computed_tokens = 4
    for token in (11, 12, 13):
        step(scheduler, request, token)
    request.async_tokens_to_discard = 1
    assert step(scheduler, request, 98) == ([], False)
    assert step(scheduler, request, 99) == ([13], True)
