"""Several answers to each question, on disk, whose activations hold whether they are right."""

import numpy as np
import pytest

from hiddenlake.cache.store import open_capture

QUESTIONS, K = 160, 4

WINOBIAS = (
    "sentence,pronoun,answer,incorrect_answer,q_instruct,q\n"
    "The nurse met the chef because she asked.,she,nurse,chef,Who is she?,The pronoun 'she' refers to the\n"
    "The nurse met the chef because he asked.,he,nurse,chef,Who is he?,The pronoun 'he' refers to the\n"
)


@pytest.fixture
def winobias(tmp_path):
    """A file of two rows."""
    file = tmp_path / "winobias.csv"
    file.write_text(WINOBIAS)
    return file


@pytest.fixture(scope="session")
def greedy(make_capture):
    """One answer to each question."""
    return make_capture(n=QUESTIONS)


@pytest.fixture(scope="session")
def drawn_data(make_capture):
    """K more answers to each: named by letters, right ones `right`."""
    n = QUESTIONS * K
    data = make_capture(n=n, positions=("exact_answer_last",), seed=5)
    name = np.random.default_rng(0).choice(["a", "b", "c"], n).astype(object)
    name[data.correct.values] = "right"
    name[~data.exact_answer_valid.values] = None
    return data.assign(
        index=("sample", np.arange(n) // K), sample_index=("sample", np.arange(n) % K), exact_answer=("sample", name)
    )


@pytest.fixture(scope="session")
def drawn(drawn_data, store_capture, tmp_path_factory):
    identity = {"model": "synthetic/model", "task": "synthetic"}
    return open_capture(store_capture(drawn_data, tmp_path_factory.mktemp("lake") / "x-resampled", identity))
