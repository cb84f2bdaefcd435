"""Rows of the paper's data sets, from the files in which they are published."""

import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.probing.tasks.paper.judges import NLI
from hiddenlake.probing.tasks.paper.prompts import Row
from hiddenlake.probing.tasks.rows import kind, read_rows, text, texts

# Columns of one row, and where it stands.
Fields = dict[str, Any]
Reader = Callable[[Fields, str], Row]

_NLI_QUESTION = re.compile(r'For the statement, "(.*)", does the hypothesis ', re.DOTALL)
_SENTIMENTS = {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}


def fields_of(path: Path) -> Iterator[tuple[str, Fields]]:
    """(where it stands, columns) of each row of a .csv, .tsv, .jsonl or .json file.

    JSON is a list of objects, or an object whose `Data` is one. Raises BadInputError.
    """
    if path.suffix != ".json":
        yield from read_rows(path, lambda *_: None, "the data set's own rows")
        return
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise BadInputError(f"{path}: not JSON ({error}): expected a list of objects") from error
    rows = data.get("Data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise BadInputError(f'{path}: found {kind(data)}: expected a list of objects, or {{"Data": [...]}}')
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise BadInputError(f"{where}: found {kind(row)}: expected an object")
        yield where, row


def _field(fields: Fields, where: str, *names: str) -> Any:
    """The first of these columns that is there."""
    for name in names:
        if name in fields:
            return fields[name]
    raise BadInputError(
        f"{where}: {' or '.join(names)} is missing (found {', '.join(map(str, fields)) or 'nothing'}): "
        f"is it a file of this data set?"
    )


def _text(fields: Fields, where: str, *names: str) -> str:
    return text(_field(fields, where, *names), names[0], where)


def triviaqa(fields: Fields, where: str) -> Row:
    """`Question` and `Answer` with its `Aliases` (the official files); `question` and `golden_answers`, or `gold_answer` and
    `aliases` (excerpts); `question` and `answer` with its `aliases` (the hub).
    """
    question = _text(fields, where, "Question", "question")
    answer = _field(fields, where, "Answer", "golden_answers", "aliases", "answer")
    if isinstance(answer, dict):
        answer = _field(answer, where, "Aliases", "aliases")
    return Row(question, texts(list(answer) if isinstance(answer, tuple) else answer, "aliases", where))


def hotpotqa(fields: Fields, where: str) -> Row:
    """`question`, `answer`, and `context`: [title, sentences] of each paragraph, or from the hub `sentences` of each."""
    context = fields.get("context", [])
    paragraphs = context["sentences"] if isinstance(context, dict) else [sentences for _, sentences in context]
    sentences = tuple(str(sentence) for paragraph in paragraphs for sentence in paragraph)
    return Row(_text(fields, where, "question"), (_text(fields, where, "answer"),), context=sentences)


def natural_questions(fields: Fields, where: str) -> Row:
    """`Question`, `Answer`, `Context`."""
    context = (_text(fields, where, "Context"),)
    return Row(_text(fields, where, "Question"), (_text(fields, where, "Answer"),), context=context)


def movies(fields: Fields, where: str) -> Row:
    """`Question`, `Answer`."""
    return Row(_text(fields, where, "Question"), (_text(fields, where, "Answer").strip(),))


def math(fields: Fields, where: str) -> Row:
    """`question`, and `answer`: a list of one number, like [9.0]."""
    answer = _field(fields, where, "answer")
    try:
        [value] = literal_eval(answer) if isinstance(answer, str) else answer
        value = float(value)
    except (SyntaxError, TypeError, ValueError) as error:
        raise BadInputError(f"{where}: answer is {answer!r}: expected a list of one number, like [9.0]") from error
    return Row(_text(fields, where, "question"), (str(value),))


def winobias(fields: Fields, where: str) -> Row:
    """`sentence`, `answer`, `incorrect_answer`, `q_instruct` (a question) and `q` (its answer's beginning).

    A group is the two answers: up to eight sentences about the same two people, with pronouns of both genders, of which
    half turn the answer. On both sides of a split they teach a probe the opposite of what it is asked.
    """
    right, wrong = _text(fields, where, "answer"), _text(fields, where, "incorrect_answer")
    return Row(
        _text(fields, where, "sentence"),
        (right,),
        (wrong,),
        context=(_text(fields, where, "q_instruct"), _text(fields, where, "q")),
        group=" ".join(sorted((right, wrong))),
    )


def winogrande(fields: Fields, where: str) -> Row:
    """`Question`, `Answer`, `Wrong_Answer`.

    A group is the two answers and the sentence's first three words: most sentences have a twin that turns the answer.
    """
    question = _text(fields, where, "Question")
    right, wrong = _text(fields, where, "Answer"), _text(fields, where, "Wrong_Answer")
    return Row(question, (right,), (wrong,), group=" ".join([*sorted((right, wrong)), *question.split()[:3]]))


def mnli(fields: Fields, where: str) -> Row:
    """`Question`, `Answer` (entailment, neutral, contradiction). A group is a statement: it may have several hypotheses."""
    question, answer = _text(fields, where, "Question"), _text(fields, where, "Answer")
    if answer not in NLI:
        raise BadInputError(f"{where}: Answer is {answer!r}: expected one of {', '.join(NLI)}")
    found = _NLI_QUESTION.match(question)
    return Row(question, (answer,), group=found.group(1) if found else question)


def imdb(fields: Fields, where: str) -> Row:
    """`text` and `label` (0 or neg, 1 or pos), or `Text` and `Sentiment` (Negative, Positive)."""
    label = str(_field(fields, where, "label", "Sentiment")).strip().lower()
    label = _SENTIMENTS.get(label, label)
    if label not in _SENTIMENTS.values():
        raise BadInputError(f"{where}: label is {label!r}: expected 0 or 1, or negative or positive")
    return Row(_text(fields, where, "text", "Text"), (label,))
