"""Log-probabilities row by row equal the log-softmax of the whole."""

import pytest
import torch

from hiddenlake.cache.worker.logprobs import install_logprobs, token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_they_equal_the_log_softmax(dtype, rows):
    torch.manual_seed(rows)
    logits = (torch.randn(rows, 1000) * 5).to(dtype)
    ids = torch.randint(1000, (rows,))
    expected = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(logits, ids).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_token_that_is_next_to_impossible():
    """Its own logit as the shift would overflow; -inf is what a masked token has."""
    logits = torch.tensor([[0.0, 200.0, 1.0], [5.0, 5.0, -torch.inf]])
    found = token_logprobs(logits, torch.tensor([0, 0]))
    assert found[0] == -200 and abs(float(found[1]) + 0.6931) < 1e-4


@pytest.mark.parametrize("shift", [-200.0, -95.0, -60.0, 60.0, 85.0, 200.0])
def test_logits_far_from_zero(shift):
    """float32 has no exponential of some of these, and one of few digits of others."""
    logits = torch.randn(4, 300) + shift
    ids = torch.tensor([0, 5, 7, 299])
    expected = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(logits, ids).double(), expected, atol=1e-4, rtol=0)


def test_more_than_the_token_itself_goes_the_old_way():
    vllm = pytest.importorskip("vllm.v1.sample.sampler")
    sampler = vllm.Sampler()
    install_logprobs(sampler)
    logits = torch.randn(3, 50)
    ids = torch.tensor([4, 0, 9])
    raw = sampler.compute_logprobs(logits)
    logits.zero_()  # what the sampler does to its logits must not be seen
    own, three = sampler.gather_logprobs(raw, 0, ids), sampler.gather_logprobs(raw, 3, ids)
    torch.testing.assert_close(own.logprobs[:, 0], three.logprobs[:, 0])
    assert own.logprob_token_ids[:, 0].tolist() == three.logprob_token_ids[:, 0].tolist() == ids.tolist()
    assert three.logprobs.shape == (3, 4)
