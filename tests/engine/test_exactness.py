"""What is stored equals what Hugging Face computes for the same token ids: every site, layer, position and token."""

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.positions import PAPER

from .conftest import SITES, make_task, relative_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POSITIONS = (*PAPER, "0", "7", "-45")


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def capture(request, demo_model_folder, module_path):
    """24 prompts of mixed length in one batch, all sites in float32."""
    out = module_path / request.param
    summary = hiddenlake.capture(
        str(demo_model_folder),
        make_task(24),
        out=out,
        sites=SITES,
        positions=POSITIONS,
        engine=request.param,
        dtype="float32",
        max_new_tokens=16,
        ring_bytes=4 << 30,
    )
    assert (summary.committed, summary.failed) == (24, 0)
    return hiddenlake.open_capture(out)


def test_every_cell_equals_hugging_face(capture, reference):
    samples = capture.samples().to_pylist()
    stored = {site: capture.read(site) for site in (*SITES, "embed")}
    worst = dict.fromkeys(stored, 0.0)
    cells = 0
    for i, sample in enumerate(samples):
        expected = reference(sample["token_ids"])
        for p, token in enumerate(sample["token_index"]):
            for site in stored:
                found = stored[site][..., p, i, :]
                if token < 0:
                    assert np.isnan(found).all()
                else:
                    worst[site] = max(worst[site], relative_error(found, expected[site][..., token, :]).max())
                    cells += 1
    print(f"\n{capture.place.name}: worst relative L2 error by site {worst} over {cells} site cells x 30 layers")
    assert max(worst.values()) <= 1e-4


def test_tokens_are_the_ones_that_positions_mean(capture):
    """Decoded by hand from the stored ids, without the position code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hiddenlake.demo_model())
    at = {name: p for p, name in enumerate(POSITIONS)}
    found_exact = 0
    for sample in capture.samples().to_pylist():
        ids, index = sample["token_ids"], sample["token_index"]
        assert tokenizer.decode(ids[: sample["prompt_length"]]).endswith("<|im_start|>assistant\n")
        assert ids[index[at["last_q"]]] == ids[sample["prompt_length"] - 1]
        assert ids[index[at["first_answer"]]] == ids[sample["prompt_length"]]
        assert index[at["-1"]] == len(ids) - 1
        assert index[at["0"]] == 0 and index[at["7"]] == 7
        assert index[at["-45"]] == (len(ids) - 45 if len(ids) >= 45 else -1)
        if sample["exact_answer_valid"]:
            found_exact += 1
            window = ids[index[at["exact_answer_first"]] : index[at["exact_answer_last"]] + 1]
            assert sample["exact_answer"] in tokenizer.decode(window)
            assert sample["exact_answer"] not in tokenizer.decode(window[1:])
            assert sample["exact_answer"] not in tokenizer.decode(window[:-1])
    assert found_exact >= 5


def test_last_token_is_the_end_of_sequence_token_and_has_its_activation(capture):
    ended = [s for s in capture.samples().to_pylist() if s["finish_reason"] == "stop"]
    assert ended, "some answers must end by themselves"
    keys = [s["key"] for s in ended]
    assert all(s["token_ids"][-1] == 2 for s in ended)  # <|im_end|>
    assert np.isfinite(capture.read("resid_post", position="-1", samples=keys)).all()


def test_answers_and_logprobs_are_the_models_own(capture, reference):
    for sample in capture.samples().to_pylist()[:6]:
        q = sample["prompt_length"]
        logits = reference(sample["token_ids"])["logits"][q - 1 : -1].astype(np.float64)
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        answer = sample["token_ids"][q:]
        gap = logprobs.max(-1) - logprobs[np.arange(len(answer)), answer]
        assert (gap < 1e-3).all(), "greedy: each token is the most probable one, or as good"
        np.testing.assert_allclose(sample["logprobs"], logprobs[np.arange(len(answer)), answer], atol=1e-3)


def test_both_engines_give_the_same_keys(demo_model_folder, capture):
    """A key is known before the answer, and does not depend on the engine."""
    job = plan_job(demo_model_folder, make_task(24), sites=("mlp_out",), dtype="float32", max_new_tokens=16)
    assert [p.key for p in job.prompts] == capture.keys
