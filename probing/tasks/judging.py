"""Judging the paper's way: an answer is right when it holds one of the gold answers, in any case.

Source: `automatic_correctness` of "LLMs Know More Than They Show" (arXiv 2410.02707). Its second
language model, which reads an exact answer out of a wrong one, is replaced by the wrong answers that
the task itself knows; where it knows none, a wrong answer has no exact answer.
"""

from collections.abc import Iterable

from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case

# Part of the value identity: raised when the same answer may be judged otherwise.
RULES = "substring/1"


def judge_by_substring(question: Question, answer: str) -> Judgement:
    """Mark one answer.

    Correct if any of `question.answers` is a substring of `answer`, ignoring case. The exact answer is
    the earliest of them, else the earliest of `question.wrong_answers`, else None; of two that start at
    the same place, the longer. It is spelled as in the answer.
    """
    gold = earliest(answer, question.answers)
    if gold is not None:
        return Judgement(True, gold)
    return Judgement(False, earliest(answer, question.wrong_answers))


def earliest(text: str, names: Iterable[str]) -> str | None:
    """The part of `text` that spells the earliest of `names`, ignoring case: at one place, the longest."""
    found = [span for name in names if (span := find_ignoring_case(text, name)) is not None]
    if not found:
        return None
    start, end = min(found, key=lambda span: (span[0], -span[1]))
    return text[start:end]
