"""The task of a user's own file: questions and gold answers from JSONL or CSV, judged by substring."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.probing.tasks import judging
from hiddenlake.probing.tasks.questions import check_limit, digest, make_question
from hiddenlake.probing.tasks.rows import read_rows, text, texts

_EXAMPLE = '{"question": "Who wrote Emma?", "answers": ["Jane Austen", "Austen"]}'


@dataclass(frozen=True, slots=True)
class FileTask:
    """A task read from a file. Its name is the file's, without the suffix.

    digest : SHA-256 of the questions: two files of one name are told apart by it.
    """

    name: str
    rules: str
    questions: tuple[Question, ...]
    digest: str

    def judge(self, question: Question, answer: str) -> Judgement:
        """See `judging.judge_by_substring`."""
        return judging.judge_by_substring(question, answer)


def file_task(path: str | Path, limit: int | None = None) -> FileTask:
    """Read a task from a UTF-8 file with one question a row, of which the first `limit` are asked.

    Columns: `question` (text), `answers` (the gold answer and its aliases), and optionally
    `wrong_answers` (others that can be recognised) and `group` (rows of one group never lie on both
    sides of a split; the question's text where none is given). Other columns are not read.

    In JSONL each line is an object, with `answers` and `wrong_answers` as lists of strings. In CSV the
    first row names the columns, and the two are JSON lists or one string. Empty lines mean nothing.

    Raises BadInputError, naming the line, for anything else. The whole file is read and checked.
    """
    check_limit(limit)
    path = Path(path)
    rows = read_rows(path, _require_columns, _EXAMPLE)
    questions = tuple(_question(index, row, where) for index, (where, row) in enumerate(rows))
    if not questions:
        raise BadInputError(f"{path}: the file has no question: expected rows like {_EXAMPLE}")
    questions = questions[:limit]
    return FileTask(path.stem, judging.RULES, questions, digest(questions))


def _question(index: int, row: dict[str, Any], where: str) -> Question:
    answers = texts(row["answers"], "answers", where)
    if not answers:
        raise BadInputError(f"{where}: answers is empty: expected the gold answer and any aliases")
    wrong_answers = texts(row.get("wrong_answers", []), "wrong_answers", where)
    both = {answer.lower() for answer in answers} & {answer.lower() for answer in wrong_answers}
    if both:
        raise BadInputError(f"{where}: {sorted(both)[0]!r} is both in answers and in wrong_answers: remove one")
    group = text(row["group"], "group", where) if "group" in row else ""
    return make_question(index, text(row["question"], "question", where), answers, wrong_answers, group)


def _require_columns(found: Collection[str], where: str) -> None:
    for column in ("question", "answers"):
        if column not in found:
            raise BadInputError(
                f"{where}: {column} is missing (found {', '.join(found) or 'nothing'}): expected question and answers, "
                f"like {_EXAMPLE}"
            )
