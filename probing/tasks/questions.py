"""What all tasks do with their questions: number them, group them, take the first, fingerprint them."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Question


def make_question(
    index: int, question: str, answers: Sequence[str], wrong_answers: Sequence[str] = (), group: str = ""
) -> Question:
    """A question whose group is its text unless one is named, so that repeats are never split."""
    return Question(index, question, tuple(answers), tuple(wrong_answers), group or question)


def check_limit(limit: int | None) -> None:
    """Refuse a number of questions below 1. None means all."""
    if limit is not None and limit < 1:
        raise BadInputError(f"limit is {limit}: expected at least 1 question, or no limit for all of them")


def digest(questions: Sequence[Question]) -> str:
    """SHA-256, 64 hex digits, over the canonical JSON of the questions in order: all that a task asks and accepts."""
    # Thousands of questions share one tuple of hundreds of wrong answers.
    encode = cache(lambda strings: json.dumps(strings, separators=(",", ":")))
    sha = hashlib.sha256()
    for q in questions:
        given = [] if q.given is None else [q.given]
        row = json.dumps([q.index, q.question, q.answers, q.group, *given], separators=(",", ":"))
        sha.update(f"{row}\n{encode(q.wrong_answers)}\n".encode())
    return sha.hexdigest()
