"""How exact answers are extracted: prompts, what counts as a reply, tries and seeds. By properties, without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.inquiry import Reply
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.probing.tasks.paper import DATA_SETS, extraction, paper_task
from hiddenlake.probing.tasks.paper.extraction import FACTS, NUMBERS, TRIES, Extraction, extract, mark, short_answer

ANSWER = "It was Jane Austen, who lived in Bath."
WRONG = Judgement(False, None)
TEXTS = st.text(alphabet="ab (.\n\"'ÉéİßNO ANSWER", max_size=20)


def reply(text, ended=True):
    return Reply(text, ended, 1, 1)


def run(steps, replies):
    """(what an inquiry returns, what it asked) where these are replied."""
    asked = []
    replies = iter(replies)
    try:
        ask = next(steps)
        while True:
            asked.append(ask)
            ask = steps.send(next(replies))
    except StopIteration as end:
        return end.value, asked


def extracted(*texts):
    return run(extract("Who?", ANSWER, FACTS, ()), [reply(t) if isinstance(t, str) else t for t in texts])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Jane Austen", "Jane Austen"), (" jane austen.\nShe wrote", "Jane Austen"), ("Jane Austen (born 1775)", "Jane Austen"),
        ('"Jane Austen."', "Jane Austen"), ("\n\nAUSTEN", "Austen"), (ANSWER, ANSWER[:-1]),
    ],
)  # fmt: skip
def test_a_part_of_the_answer_is_taken_as_it_is_spelled_there(text, name):
    assert extracted(text) == (name, extracted(text)[1])
    assert len(extracted(text)[1]) == 1


@pytest.mark.parametrize("text", ["NO ANSWER", "no answer.", " No Answer\nbecause"])
def test_no_answer_ends_the_tries(text):
    found, asked = extracted("Emily Bronte", text)
    assert found is None and len(asked) == 2


def test_what_is_not_in_the_answer_is_tried_again_and_then_absent():
    found, asked = extracted("Emily Bronte", "", "...", "(Jane)", "Bath")
    assert found == "Bath" and len(asked) == TRIES == 5
    found, asked = extracted(*["Emily Bronte"] * TRIES)
    assert found is None and len(asked) == TRIES
    assert asked[0].sampling.greedy and [a.sampling.temperature for a in asked[1:]] == [1.0] * 4
    assert [a.sampling.seed for a in asked[1:]] == [1, 2, 3, 4]
    assert len({a.text for a in asked}) == 1


def test_a_question_that_is_too_long_leaves_it_absent():
    assert extracted(None)[0] is None and len(extracted(None)[1]) == 1


@given(TEXTS, st.booleans())
def test_a_reply_that_was_cut_is_no_shorter_answer(text, ended):
    name = short_answer(reply(text, ended))
    shown = text.strip()
    if name is None:
        assert not ended and "\n" not in shown and "(" not in shown
        return
    assert ended or "\n" in shown or "(" in shown
    assert name in text and "\n" not in name and "(" not in name and name == name.strip()
    assert short_answer(reply(name)) == name, "nothing is left to strip"


@given(TEXTS, st.lists(TEXTS, max_size=TRIES))
def test_what_is_found_is_always_in_the_answer(answer, texts):
    texts += ["NO ANSWER"]
    found, asked = run(extract("Who?", answer, FACTS, ()), [reply(t) for t in texts])
    assert len(asked) <= TRIES
    assert found is None or (found and found in answer)


@given(TEXTS, TEXTS)
def test_the_prompt_ends_in_what_is_asked_and_begins_alike(question, answer):
    prompt = extraction.extraction_prompt(question, answer, FACTS)
    assert prompt.endswith(f"\n\nQ: {question}\nA: {answer}\nShort answer:")
    assert prompt.startswith(extraction.extraction_prompt("", "", FACTS).removesuffix("Q: \nA: \nShort answer:"))
    assert "only the relevant tokens" in prompt and prompt.count("Short answer:") == 4


@pytest.mark.parametrize("shots", [FACTS, extraction.ROLES, NUMBERS])
def test_the_examples_keep_their_own_rule(shots):
    for shot in shots:
        assert shot.exact == "NO ANSWER" or shot.exact in shot.answer
    assert [shot.exact == "NO ANSWER" for shot in shots] == [False, False, True]


@pytest.mark.parametrize(
    ("texts", "verdict", "tries"),
    [
        (["1"], True, 1), (["0"], False, 1), ([" 1.\n"], True, 1), (["Yes", "1"], True, 2), (["the 1", "0"], False, 2),
        (["Yes"] * 5, False, 5), ([None], False, 1),
    ],
)  # fmt: skip
def test_a_verdict_is_0_or_1_and_else_tried_again_and_then_wrong(texts, verdict, tries):
    steps = mark("Who?", ("Austen", "J. A."), ANSWER, ())
    found, asked = run(steps, [t if t is None else reply(t, ended=False) for t in texts])
    assert (found, len(asked)) == (verdict, tries)
    assert asked[0].text.endswith(
        f"Question: Who?\nCorrect answer: Austen, or J. A.\nModel's answer: {ANSWER}\nOutput:"
    )


def inquire(judgement, replies, judges=False, stop=(), answer=ANSWER):
    question = Question(0, "A context.\nWho?", ("Mary Shelley",))
    follow_up = Extraction(("Who?",), FACTS, judges, stop)
    return run(follow_up.inquire(question, answer, judgement), map(reply, replies))


def test_what_the_judge_found_stands():
    assert inquire(Judgement(True, "Austen"), []) == (Judgement(True, "Austen"), [])
    assert inquire(WRONG, [], answer=" \n") == (WRONG, [])


def test_a_wrong_answer_is_asked_about_without_its_context():
    found, asked = inquire(WRONG, ["Austen"])
    assert found == Judgement(False, "Austen") and "A context." not in asked[0].text and "Q: Who?\n" in asked[0].text


def test_the_model_judges_before_it_extracts():
    found, asked = inquire(WRONG, ["1", "Jane"], judges=True)
    assert found == Judgement(True, "Jane") and len(asked) == 2
    assert inquire(WRONG, ["0", "Jane"], judges=True)[0] == Judgement(False, "Jane")
    assert inquire(WRONG, ["x"] * 10, judges=True)[0] == WRONG


def test_a_model_without_a_chat_template_is_asked_about_its_first_line():
    found, asked = inquire(WRONG, ["Jane", "Bath"], stop=("\n",), answer=" In Bath.\nQ: Jane?")
    assert found == Judgement(False, "Bath")
    assert all(ask.sampling.stop == ("\n",) and "\nA: In Bath.\nShort" in ask.text for ask in asked)


class Chat:
    name, chat_template = "mistral-7b-instruct", "a template"


@pytest.fixture
def movies(tmp_path):
    path = tmp_path / "movies.csv"
    path.write_text("Question,Answer\nWho acted as Ann in the movie 'Snow'?,Eva Lind\n")
    return path


def test_the_extractor_is_part_of_the_rules(movies):
    same, none = (paper_task("movies", Chat, movies, extractor=e) for e in ("same", "none"))
    assert paper_task("movies", Chat, movies) == same
    assert same.follow_up.questions == ("Who acted as Ann in the movie 'Snow'?",) and none.follow_up is None
    assert same.rules == f"{none.rules}, exact answers extracted by the model itself/1"
    with pytest.raises(BadInputError, match="'mine' is no address of a server"):
        paper_task("movies", Chat, movies, extractor="mine")


def test_tasks_whose_judges_know_all_answers_need_no_extractor(tmp_path):
    open_ended = {"triviaqa", "hotpotqa", "hotpotqa_with_context", "natural_questions_with_context", "movies", "math"}
    assert {name for name, data_set in DATA_SETS.items() if data_set.shots} == open_ended
    assert [name for name, d in DATA_SETS.items() if d.model_judges] == ["natural_questions_with_context"]
    path = tmp_path / "imdb.csv"
    path.write_text("text,label\nA gem.,1\n")
    assert paper_task("imdb", Chat, path).follow_up is None
    with pytest.raises(
        BadInputError, match="the judge of imdb knows all of its answers: leave the extractor 'same' out"
    ):
        paper_task("imdb", Chat, path, extractor="same")


def test_the_rules_change_with_the_prompts():
    """Raise extraction.RULES when this fails: the same replies to other prompts are other exact answers."""
    from hiddenlake.cache.identity import digest

    texts = [extraction.extraction_prompt("q", "a", shots) for shots in (FACTS, extraction.ROLES, NUMBERS)]
    frozen = {1: "343c73e88534483008f04c9035ee51e0"}
    assert digest([*texts, extraction.mark_prompt("q", ("g",), "a")]) == frozen[extraction.RULES]
