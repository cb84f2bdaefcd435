"""The paper's judges, to the letter (`compute_correctness` of its code), and strict ones.

The paper looks for gold answers as substrings, so that a gold 1 is found in 12. A strict judge takes whole words, and
of numbers their value.
"""

import re
from collections.abc import Callable, Sequence

from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case

# Of (question, answer).
Judge = Callable[[Question, str], Judgement]

# What a model may write for each label of natural language inference.
NLI = {
    "neutral": ("neutrality", "neutral", "neutality"),
    "entailment": ("entailment", "entail"),
    "contradiction": ("contradiction", "contradict"),
}

_SENTIMENTS = ("negative", "positive")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# (start, end) of a name in a text, or None.
_Find = Callable[[str, str], tuple[int, int] | None]


def find_words(text: str, name: str) -> tuple[int, int] | None:
    """Where `text` first spells `name` as whole words, ignoring case."""
    start = 0
    while (found := find_ignoring_case(text[start:], name)) is not None:
        first, end = found[0] + start, found[1] + start
        if not (text[first - 1 : first].isalnum() or text[end : end + 1].isalnum()):
            return first, end
        start = first + 1
    return None


def holds_gold(find: _Find) -> Judge:
    """Right where a gold answer is found. The exact answer is the earliest: of two at one place, the first listed."""

    def judge(question: Question, answer: str) -> Judgement:
        gold = _first(answer, question.answers, find)
        return Judgement(gold is not None, gold)

    return judge


def comes_first(find: _Find) -> Judge:
    """Right where the gold answer comes before the wrong one. The exact answer is the one that does."""

    def judge(question: Question, answer: str) -> Judgement:
        right, wrong = (_span(answer, names, find) for names in (question.answers, question.wrong_answers))
        correct = right is not None and (wrong is None or right[0] < wrong[0])
        span = right if correct else wrong
        return Judgement(correct, span and answer[slice(*span)])

    return judge


def winogrande(find: _Find, llama: bool) -> Judge:
    """As `comes_first`. llama : where such a model lists its choices, what follows the word "answer" counts."""
    judge = comes_first(find)

    def judge_choice(question: Question, answer: str) -> Judgement:
        return judge(question, _after_answer(answer) if llama and "A)" in answer else answer)

    return judge_choice


def _after_answer(text: str) -> str:
    at = text.lower().find("answer")
    if at < 0:
        return text
    text = text[at + len("answer") :].strip().removeprefix(":").strip().removeprefix("is").strip()
    return text.split(".")[0]


def math(question: Question, answer: str) -> Judgement:
    """Right where the number, with its decimals or without, is found. The exact answer is without, where it is there."""
    value = question.answers[0]
    whole, rounded = str(int(float(value))), str(round(float(value)))
    lowered = answer.lower()
    correct = value in lowered or whole in lowered
    exact = next((name for name in (rounded, value) if name in lowered), whole) if correct else None
    return Judgement(correct, exact)


def math_strict(question: Question, answer: str) -> Judgement:
    """Right where a number of the answer has the gold's value. The exact answer is the first that has."""
    value = float(question.answers[0])
    for found in _NUMBER.finditer(answer):
        if float(found.group().replace(",", "")) == value:
            return Judgement(True, found.group())
    return Judgement(False, None)


def imdb(question: Question, answer: str) -> Judgement:
    """By the first word, else by the sentiment that comes first. The exact answer is that; none is wrong."""
    words = answer.removeprefix("Label: ").split()
    said = words[0].strip(".</s>") if words else ""
    if said not in (*_SENTIMENTS, "neutral"):
        said = _first(answer, _SENTIMENTS, find_ignoring_case) or ""
    return Judgement(said.lower() in question.answers, said or None)


def nli(question: Question, answer: str) -> Judgement:
    """By the label that comes first, however it is spelled. The exact answer is that word."""
    said = _first(answer, [name for names in NLI.values() for name in names], find_ignoring_case)
    return Judgement(said is not None and said.lower() in NLI[question.answers[0]], said)


def _span(text: str, names: Sequence[str], find: _Find) -> tuple[int, int] | None:
    """The earliest of the names in `text`; of two at one place, the first listed."""
    found = [span for name in names if (span := find(text, name)) is not None]
    return min(found, key=lambda span: span[0]) if found else None


def _first(text: str, names: Sequence[str], find: _Find) -> str | None:
    span = _span(text, names, find)
    return span and text[slice(*span)]
