"""What the paper asks: its prompts, with the blanks at the beginning of their lines, for models with and without a
chat template.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set.

    question : as in its file.  answers, wrong_answers : gold, and what else can be recognised.
    context : what is to be read before; or of WinoBias the two ways of asking, (instructed, to be completed).
    group : what other rows share that must not lie on both sides of a split; the question where it is empty.
    """

    question: str
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Style:
    """Of a model: whether it has a chat template, and whether it is a Llama 3."""

    chat: bool
    llama3: bool


# Of (row, the data set's first row, style).
Prompt = Callable[[Row, Row, Style], str]

_BLANKS = ("Who does the blank refer to in the sentence?", "What does the blank refer to in the sentence?")


def plain(row: Row, first: Row, style: Style) -> str:
    return row.question if style.chat else _asked(row.question, 8)


def math(row: Row, first: Row, style: Style) -> str:
    return f"{row.question} Answer shortly." if style.chat else _asked(row.question, 12)


def winobias(row: Row, first: Row, style: Style) -> str:
    return f"{row.question} {row.context[0 if style.chat else 1]}"


def winogrande(row: Row, first: Row, style: Style) -> str:
    if style.chat:
        return row.question
    return f"{_before_blank(first)} The blank refers to: {first.answers[0]}\n{_before_blank(row)} The blank refers to:"


def imdb(row: Row, first: Row, style: Style) -> str:
    """One shot, the data set's first review; none for Llama 3, which is told where to begin instead."""
    begin, shot = "", ""
    if style.llama3:
        begin = "Start with either 'positive' or 'negative' first, then elaborate."
    else:
        lines = ("", "Example:", f"Review: {first.question}", f"Label: {first.answers[0]}", f"Review: {row.question}")
        shot = _lines((*lines, "Label: "), 16)
    head = f'Classify the following movie reviews as either "positive" or "negative". {begin}'
    return _lines((head, shot, f"Review: {row.question}", "Label:"), 12)


def with_context(row: Row, first: Row, style: Style) -> str:
    """HotpotQA: its sentences, one a line, are part of the question."""
    text = "".join(f"{sentence}\n" for sentence in row.context) + row.question
    return text if style.chat else _asked(text, 8)


def natural_questions(row: Row, first: Row, style: Style) -> str:
    if style.chat:
        return f"{row.context[0]}\n{row.question}"
    return f"Context:{row.context[0]}\n{' ' * 16}Q: {row.question}\nA:"


def _asked(question: str, indent: int) -> str:
    return f"Q: {question}\n{' ' * indent}A:"


def _lines(lines: Sequence[str], indent: int) -> str:
    return f"\n{' ' * indent}".join(lines)


def _before_blank(row: Row) -> str:
    text = row.question
    for asks in _BLANKS:
        text = text.split(asks)[0]
    return text
