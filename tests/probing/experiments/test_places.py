"""What is asked of a model, and where the answers lie."""

from pathlib import Path

import pytest

from hiddenlake.cache.errors import BadInputError
from hiddenlake.probing.experiments.places import Place, paper_job, place_of


def test_each_task_and_model_has_files_of_its_own():
    place = Place(Path("paper"), "math-a-b")
    assert place.capture == Path("paper/lake/math-a-b") and place.picture("x") == Path("paper/math-a-b-x.png")
    assert place.other("resampled") == Path("paper/lake/math-a-b-resampled")


def test_a_job_is_greedy_or_draws_as_the_paper_does(winobias, tiny_model):
    greedy = paper_job("winobias", tiny_model, data=winobias)
    assert len(greedy.prompts) == 2 and greedy.identity.decoding.sampling.greedy
    assert len(greedy.coverage.positions) == 15 and greedy.coverage.layers == (0, 1, 2)
    drawn = paper_job("winobias", tiny_model, data=winobias, samples=3, layers=[1], positions=["-1"])
    sampling = drawn.identity.decoding.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 50)
    assert [(p.question.index, p.sample_index) for p in drawn.prompts] == [(i, k) for i in (0, 1) for k in (0, 1, 2)]
    assert drawn.coverage.positions == ("-1",) and drawn.coverage.layers == (1,)
    assert not {p.key for p in greedy.prompts} & {p.key for p in drawn.prompts}
    assert place_of("x", greedy).name == place_of("x", drawn).name == "winobias-tiny"
    with pytest.raises(BadInputError, match="0 samples"):
        paper_job("winobias", tiny_model, data=winobias, samples=0)
