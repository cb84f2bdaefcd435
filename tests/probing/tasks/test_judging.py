"""Judging by substring: right when a gold answer is in the answer, and which words were the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case
from hiddenlake.probing.tasks.judging import RULES, judge_by_substring


def question(answers: list[str], wrong_answers: list[str]) -> Question:
    return Question(0, "?", tuple(answers), tuple(wrong_answers), "g")


@pytest.mark.parametrize(
    ("answers", "wrong", "answer", "judgement"),
    [
        (["Japan"], [], "It is in JAPAN.", Judgement(True, "JAPAN")),
        (["Japan"], [], "It is in China.", Judgement(False, None)),
        (["Japan"], ["China"], "It is in china.", Judgement(False, "china")),
        (["Japan"], ["China"], "Not in China, but in Japan.", Judgement(True, "Japan")),
        (["Nippon", "Japan"], [], "Japan, that is Nippon.", Judgement(True, "Japan")),
        (
            ["United States", "United States of America"],
            [],
            "the united states of America",
            Judgement(True, "united states of America"),
        ),
        (["x"], ["Guinea", "Guinea-Bissau"], "Guinea-Bissau", Judgement(False, "Guinea-Bissau")),
        (["Japan"], ["China"], "", Judgement(False, None)),
        (["12"], [], "It is 3124.", Judgement(True, "12")),  # the paper's way: any substring
    ],
)
def test_judgement(answers: list[str], wrong: list[str], answer: str, judgement: Judgement) -> None:
    assert judge_by_substring(question(answers, wrong), answer) == judgement


words = st.lists(st.text("abAB ", min_size=1, max_size=3), max_size=4)


@given(words, words, st.text("abAB ", max_size=12))
def test_properties(answers: list[str], wrong: list[str], answer: str) -> None:
    judgement = judge_by_substring(question(answers, wrong), answer)
    assert judgement.correct == any(a.lower() in answer.lower() for a in answers)
    names = answers if judgement.correct else wrong
    if judgement.exact_answer is None:
        assert not any(name.lower() in answer.lower() for name in names)
        return
    assert judgement.exact_answer.lower() in {name.lower() for name in names}
    start = answer.lower().find(judgement.exact_answer.lower())
    assert answer[start : start + len(judgement.exact_answer)] == judgement.exact_answer
    for name in names:
        span = find_ignoring_case(answer, name)
        assert span is None or (start, -len(judgement.exact_answer)) <= (span[0], -(span[1] - span[0]))


def test_rules_are_frozen() -> None:
    assert RULES == "substring/1"
