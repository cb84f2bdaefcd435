"""What log-probabilities say of an answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.probing.experiments.baselines import ALL, EXACT, confidence, confidence_of

LOGPROBS = arrays(np.float64, st.integers(1, 8), elements=st.floats(-20, 0))


@given(LOGPROBS)
def test_over_all_tokens_when_the_exact_answer_is_the_whole(values):
    found = confidence([values], np.array([0]), np.array([len(values) - 1]))
    for of_all, of_exact in zip(ALL, EXACT, strict=True):
        assert found[of_all] == found[of_exact]
    assert found["logprob min"] <= found["logprob mean"] + 1e-12 <= 1e-12  # a mean of equal values is rounded
    assert found["logprob min"] == values.min() and 0 <= found["probability mean"][0] <= 1 + 1e-12


def test_only_the_exact_answers_tokens_count():
    values = np.array([-9.0, -1.0, -3.0, -8.0])
    found = confidence([values, values, values[:0]], np.array([1, -1, -1]), np.array([2, -1, -1]))
    assert found["logprob mean exact"][0] == -2 and found["logprob min exact"][0] == -3
    assert found["probability mean exact"][0] == pytest.approx((np.exp(-1) + np.exp(-3)) / 2)
    assert found["logprob min"].tolist()[:2] == [-9, -9]
    assert np.isnan(found["logprob min exact"][1:]).all() and np.isnan(found["logprob mean"][2])


def test_the_window_of_a_capture(make_capture):
    data = make_capture(n=40)
    rng = np.random.default_rng(0)
    logprobs = np.empty(40, object)
    logprobs[:] = [-rng.random(int(n)).astype(np.float32) for n in data.total_length - data.prompt_length]
    found = confidence_of(data.assign(logprobs=("sample", logprobs)))
    first, last = (data.token_index.sel(position=f"exact_answer_{end}").values for end in ("first", "last"))
    for i in range(40):
        there = first[i] >= 0
        assert np.isfinite(found["logprob min exact"][i]) == there
        if there:
            start = int(data.prompt_length[i])
            inside = logprobs[i][first[i] - start : last[i] - start + 1]
            assert found["logprob min exact"][i] == inside.min()
    with pytest.raises(UnknownNameError, match="exact_answer_first"):
        confidence_of(make_capture(n=40, positions=("last_q", "exact_answer_last")))
