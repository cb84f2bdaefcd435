"""More answers to a question are drawn once, and serve every experiment that needs no more than was captured of them."""

import shutil

import pytest

from hiddenlake.cache import capture
from hiddenlake.probing.experiments.places import LEAST, paper_job, place_of
from hiddenlake.probing.experiments.resamples import read_resamples, resample


def test_answers_are_drawn_once(winobias, tiny_model, tmp_path, monkeypatch):
    def drawing(k, **coverage):
        return paper_job("winobias", tiny_model, data=winobias, samples=k, **coverage)

    texts, rows = drawing(2, **LEAST), drawing(2, layers=[1], positions=["-1"])
    place = place_of(tmp_path, texts)
    first = resample(place, texts, "resampled", engine="transformers")
    assert first.coverage.layers == () and len(first) == 4
    assert first.nbytes < 100_000  # 128 elements twice, and the text
    with monkeypatch.context() as patch:
        patch.setattr(capture, "make_engine", None)  # nothing may be generated
        assert resample(place, texts, "resampled").path == first.path
        assert resample(place, drawing(1, **LEAST), "resampled").path == first.path
        with pytest.raises(TypeError):
            resample(place, rows, "resampled-rows")
    wide = resample(place, rows, "resampled-rows", engine="transformers")
    assert wide.coverage.layers == (1,) and wide.keys == first.keys
    shutil.rmtree(place.other("resampled"))
    monkeypatch.setattr(capture, "make_engine", None)
    again = resample(place, texts, "resampled")
    assert again.path == wide.path
    found = read_resamples(again, 2)
    assert found.index.tolist() == [0, 1] and found.correct.shape == (2, 2)


def test_more_are_added_to_what_was_drawn(winobias, tiny_model, tmp_path):
    def drawn(k):
        job = paper_job("winobias", tiny_model, data=winobias, samples=k, **LEAST)
        return resample(place_of(tmp_path, job), job, "resampled", engine="transformers")

    few, more = drawn(1), drawn(3)
    assert more.path == few.path and len(more) == 6 and set(few.keys) <= set(more.keys)
