"""The probability of `A` against `B` is Hugging Face's."""

import numpy as np
import pytest

from hiddenlake.cache import capture
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Question
from hiddenlake.probing.experiments import p_true as module
from hiddenlake.probing.experiments.p_true import WAYS, ask, p_true, p_true_job, prompt

QUESTIONS = [Question(i, f"Which city is number {i}?", ("Oslo",)) for i in range(4)]


@pytest.fixture(scope="module")
def data(make_capture):
    data = make_capture(n=3)
    columns = {
        "index": [3, 0, 1],
        "answer": ["It is Rome.", "Oslo", "Bern, I think"],
        "exact_answer": ["Rome", "Oslo", "Bern"],
    }
    return data.assign({name: ("sample", np.array(values, object)) for name, values in columns.items()})


def test_the_papers_words():
    assert prompt("Q?", "Oslo", True) == (
        "Question: Q?\n            Possible answer: Oslo\n            Is the possible answer:\n"
        "            (A) True\n            (B) False\n            The possible answer is:"
    )
    assert prompt("Q?", "Oslo", False).split("\n")[3:5] == ["        (A) False", "        (B) True"]


@pytest.fixture(scope="module")
def hugging_face(tiny_model):
    """question -> log-odds of A against B as the next token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB")

    def odds(question):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, -1].double()
        return float(logits[a] - logits[b])

    return odds


def test_log_odds_are_hugging_faces(data, tiny_model, tmp_path, hugging_face, monkeypatch):
    usable = np.array([True, False, True])
    found = p_true(data, usable, QUESTIONS, str(tiny_model), tmp_path / "p", engine="transformers")
    assert list(found) == list(WAYS)
    for (which, true_first), odds in found.items():
        assert np.isnan(odds[1])
        for i in (0, 2):
            answer = str(data["answer" if which == "answer" else "exact_answer"].values[i])
            of_a = hugging_face(prompt(QUESTIONS[int(data["index"][i])].question, answer, true_first))
            assert odds[i] == pytest.approx(of_a if true_first else -of_a, abs=1e-4)
    monkeypatch.setattr(capture, "make_engine", None)  # nothing is left to feed
    again = p_true(data, usable, QUESTIONS, str(tiny_model), tmp_path / "p")
    assert all(np.array_equal(again[way], found[way], equal_nan=True) for way in WAYS)


def test_a_prompt_that_does_not_fit_has_no_odds(data, tiny_model, tmp_path):
    long = data.assign(answer=("sample", np.array(["word " * 300, "Oslo", "Bern"], object)))
    found = p_true(long, np.ones(3, bool), QUESTIONS, str(tiny_model), tmp_path / "p", engine="transformers")
    assert np.isnan(found["answer", True]).tolist() == [True, False, False]
    assert np.isfinite(found["exact answer", True]).all()


def test_letters_that_are_no_token_are_refused(data, tiny_model, monkeypatch):
    monkeypatch.setattr(module, "LETTERS", ("(A) indeed", "(B)"))
    with pytest.raises(BadInputError, match="expected one"):
        p_true_job(str(tiny_model), ask(data, QUESTIONS))
