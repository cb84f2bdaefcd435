"""The task of given text: prompts with their answers, or plain texts, which are fed and not generated."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case
from hiddenlake.probing.tasks import judging
from hiddenlake.probing.tasks.questions import check_limit, digest
from hiddenlake.probing.tasks.rows import kind, read_rows, text, texts

RULES = "given/1"

_EXAMPLE = '{"prompt": "Who wrote Emma?", "answer": "Jane Austen.", "correct": true} or {"text": "Once upon a time"}'


@dataclass(frozen=True, slots=True)
class GivenTask:
    """Texts read from a file, with what the file says of them. Its name is the file's, without the suffix.

    judgements : one a question, None where the answer is judged by `judging.judge_by_substring`.
    """

    name: str
    rules: str
    questions: tuple[Question, ...]
    judgements: tuple[Judgement | None, ...]
    digest: str

    def judge(self, question: Question, answer: str) -> Judgement:
        """What the file says, else by substring of its gold answers."""
        known = self.judgements[question.index]
        return judging.judge_by_substring(question, answer) if known is None else known


def given_task(path: str | Path, limit: int | None = None) -> GivenTask:
    """Read given text from a UTF-8 .jsonl or .csv file, of which the first `limit` rows are fed.

    Pairs have the columns `prompt` and `answer`. The prompt is one user turn in the model's chat template, or plain
    text for a model without one; the answer follows as it is, so an end-of-turn token must be written out. Optional:
    `correct` (true or false), `exact_answer` (a part of the answer), `answers` (gold answers, by which an answer
    without `correct` is judged), `group` (rows of one group never lie on both sides of a split; the prompt where
    none is given).

    Plain texts have the column `text`, tokenised with the special tokens that the tokenizer adds, and optionally
    `correct` and `group`. All of it is prompt.

    Raises BadInputError, naming the line. The whole file is read and checked.
    """
    check_limit(limit)
    path = Path(path)
    found = [_row(index, row, where) for index, (where, row) in enumerate(read_rows(path, _require_columns, _EXAMPLE))]
    if not found:
        raise BadInputError(f"{path}: the file has no row: expected rows like {_EXAMPLE}")
    questions, judgements = zip(*found[:limit], strict=True)
    if len({question.given == "" for question in questions}) > 1:
        raise BadInputError(f"{path}: some rows are plain texts and some are pairs: make two files")
    return GivenTask(path.stem, f"{RULES} {judging.RULES}", questions, judgements, digest(questions))


def _row(index: int, row: dict[str, Any], where: str) -> tuple[Question, Judgement | None]:
    correct = _correct(row.get("correct"), where)
    if "text" in row:
        body = text(row["text"], "text", where)
        group = text(row["group"], "group", where) if "group" in row else body
        return Question(index, body, (), group=group, given=""), Judgement(correct, None)
    prompt, answer = text(row["prompt"], "prompt", where), text(row["answer"], "answer", where)
    group = text(row["group"], "group", where) if "group" in row else prompt
    answers = texts(row.get("answers", []), "answers", where)
    exact = None
    if "exact_answer" in row:
        exact = text(row["exact_answer"], "exact_answer", where).strip()
        if find_ignoring_case(answer, exact) is None:
            raise BadInputError(f"{where}: exact_answer {exact!r} is not a part of the answer: copy it from there")
    question = Question(index, prompt, answers, group=group, given=answer)
    if correct is None and answers:
        judged = judging.judge_by_substring(question, answer)
        return question, None if exact is None else Judgement(judged.correct, exact)
    return question, Judgement(correct, exact)


def _correct(value: Any, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    known = {"true": True, "false": False, "1": True, "0": False, 1: True, 0: False}
    found = known.get(value.strip().lower() if isinstance(value, str) else value)
    if found is None:
        raise BadInputError(f"{where}: correct is {kind(value)} ({value!r}): expected true or false")
    return found


def _require_columns(found: Collection[str], where: str) -> None:
    if "text" not in found and not {"prompt", "answer"} <= set(found):
        raise BadInputError(
            f"{where}: found the columns {', '.join(found) or 'nothing'}: expected prompt and answer, or text, like {_EXAMPLE}"
        )
