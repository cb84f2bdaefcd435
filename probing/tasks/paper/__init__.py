"""The ten tasks of "LLMs Know More Than They Show" (arXiv:2410.02707): their data, prompts and judges."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from hiddenlake.cache.chat_server import find_served
from hiddenlake.cache.errors import BadInputError, HiddenlakeError, UnknownNameError
from hiddenlake.cache.model import Model
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case
from hiddenlake.probing.tasks.paper import extraction, judges, prompts, readers
from hiddenlake.probing.tasks.paper.extraction import Extraction, Shot
from hiddenlake.probing.tasks.paper.judges import Judge, find_words
from hiddenlake.probing.tasks.paper.prompts import Prompt, Row, Style
from hiddenlake.probing.tasks.paper.readers import Reader
from hiddenlake.probing.tasks.questions import check_limit, digest, make_question

# Part of the value identity: raised when the same answer may be judged otherwise.
_RULES = 1

_HEATMAP = ("last_q", "first_answer", "second_answer", "exact_answer_before_first")
_EXACT = ("exact_answer_first", "exact_answer_last", "exact_answer_after_last")
_LAST = tuple(str(-k) for k in range(8, 0, -1))

# Rows that the paper takes of large data sets.
_DRAWN = 10_000

# (path on the hub, configuration, split)
Hub = tuple[str, str | None, str]


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the paper does with one data set.

    reader : its docstring says which fields a row has.  judge, strict : of a style.
    hub : where it lies, None where it does not.  source : what to say then.
    draw : which rows, in which order, given how many there are.
    max_new_tokens : of an answer.  positions : the columns of its heatmap.
    shots : how exact answers are extracted by a language model; none where the judge knows all that can be answered.
    model_judges : whether one also says if an answer is right in which the gold one was not found.
    """

    reader: Reader
    prompt: Prompt
    judge: Callable[[Style], Judge]
    strict: Callable[[Style], Judge]
    hub: Hub | None = None
    source: str = ""
    draw: Callable[[int], Sequence[int]] = range
    max_new_tokens: int = 100
    positions: tuple[str, ...] = (*_HEATMAP, *_EXACT, *_LAST)
    shots: tuple[Shot, ...] = ()
    model_judges: bool = False


def _split(n: int) -> Sequence[int]:
    """The paper's training rows."""
    return train_test_split(range(n), train_size=_DRAWN, random_state=42)[0] if n > _DRAWN else range(n)


def _shuffled(n: int) -> Sequence[int]:
    """In any order: the files have all of one label first. The paper draws HotpotQA's with replacement; here is none twice."""
    return np.random.RandomState(0).permutation(n)[:_DRAWN].tolist()


def _gold(find) -> Callable[[Style], Judge]:
    return lambda style: judges.holds_gold(find)


def _always(judge: Judge) -> Callable[[Style], Judge]:
    return lambda style: judge


_PAPERS = "data/ of github.com/technion-cs-nlp/LLMsKnow"
_TRIVIAQA = ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "train")
_HOTPOTQA = ("hotpotqa/hotpot_qa", "distractor", "train")

DATA_SETS: dict[str, DataSet] = {
    "triviaqa": DataSet(
        readers.triviaqa, prompts.plain, _gold(find_ignoring_case), _gold(find_words), _TRIVIAQA, draw=_split,
        shots=extraction.FACTS,
    ),
    "hotpotqa": DataSet(
        readers.hotpotqa, prompts.plain, _gold(find_ignoring_case), _gold(find_words), _HOTPOTQA, draw=_shuffled,
        shots=extraction.FACTS,
    ),
    "hotpotqa_with_context": DataSet(
        readers.hotpotqa, prompts.with_context, _gold(find_ignoring_case), _gold(find_words), _HOTPOTQA, draw=_shuffled,
        shots=extraction.FACTS,
    ),
    "natural_questions_with_context": DataSet(
        readers.natural_questions, prompts.natural_questions, _gold(find_ignoring_case), _gold(find_words),
        source=f"nq_wc_dataset.csv in {_PAPERS}", shots=extraction.FACTS, model_judges=True,
    ),
    "movies": DataSet(
        readers.movies, prompts.plain, _gold(find_ignoring_case), _gold(find_words),
        source=f"movie_qa_train.csv in {_PAPERS}", shots=extraction.ROLES,
    ),
    "math": DataSet(
        readers.math, prompts.math, _always(judges.math), _always(judges.math_strict),
        source=f"AnswerableMath.csv in {_PAPERS}", max_new_tokens=200, shots=extraction.NUMBERS,
    ),
    "winobias": DataSet(
        readers.winobias, prompts.winobias, _always(judges.comes_first(find_ignoring_case)),
        _always(judges.comes_first(find_words)), source=f"winobias_dev.csv in {_PAPERS}",
    ),
    "winogrande": DataSet(
        readers.winogrande, prompts.winogrande, lambda style: judges.winogrande(find_ignoring_case, style.llama3),
        lambda style: judges.winogrande(find_words, style.llama3), source=f"winogrande_train.csv in {_PAPERS}",
    ),
    "mnli": DataSet(
        readers.mnli, prompts.plain, _always(judges.nli), _always(judges.nli), source=f"mnli_train.csv in {_PAPERS}"
    ),
    "imdb": DataSet(
        readers.imdb, prompts.imdb, _always(judges.imdb), _always(judges.imdb),
        ("stanfordnlp/imdb", None, "train"), draw=_shuffled, positions=("last_q", *_EXACT, *_LAST),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PaperTask:
    """One data set, asked of one kind of model.

    stop : strings at which an answer ends: a model without a chat template would go on with the next question.
    follow_up : how a language model finds exact answers; None where none is asked.
    """

    name: str
    rules: str
    questions: tuple[Question, ...]
    digest: str
    stop: tuple[str, ...]
    follow_up: Extraction | None
    data_set: DataSet = field(repr=False, compare=False)
    _judge: Judge = field(repr=False, compare=False)

    def judge(self, question: Question, answer: str) -> Judgement:
        """Mark one answer; of a model without a chat template, its first line."""
        return self._judge(question, answer.strip().split("\n")[0] if self.stop else answer)


def paper_task(
    name: str,
    model: Model,
    data: str | Path | None = None,
    limit: int | None = None,
    strict: bool = False,
    extractor: str | None = None,
) -> PaperTask:
    """A task of the paper, its first `limit` rows.

    data : a file in one of the formats that the reader of the data set names; by default it comes from the hub.
    strict : gold answers are whole words, and numbers have their value, which the paper does not ask for.
    extractor : who finds the exact answer where the judge found none: `same` for the model that answers, the address of an
        OpenAI-compatible server for another, `none` for nobody, so that wrong answers have none. By default `same`
        where any text may be an answer; of the other tasks the judge knows all answers, and nobody is asked.

    Raises UnknownNameError, BadInputError, and CaptureError for a server that does not answer.
    """
    if name not in DATA_SETS:
        raise UnknownNameError(f"unknown task {name!r}: expected one of {', '.join(DATA_SETS)}")
    check_limit(limit)
    data_set = DATA_SETS[name]
    rows = list(_rows(name, data_set, data))
    if not rows:
        raise BadInputError(f"{data}: the file has no row")
    rows = [rows[i] for i in data_set.draw(len(rows))[:limit]]
    style = Style(chat=model.chat_template is not None, llama3="llama-3" in model.name.lower())
    questions = tuple(
        make_question(
            i, data_set.prompt(row, rows[0], style), row.answers, row.wrong_answers, row.group or row.question
        )
        for i, row in enumerate(rows)
    )
    judge = (data_set.strict if strict else data_set.judge)(style)
    rules = f"llmsknow {name}{' strict' if strict else ''}/{_RULES}"
    stop = () if style.chat else ("\n",)
    follow_up = _follow_up(name, data_set, rows, stop, extractor)
    if follow_up is not None:
        by = follow_up.served.name if follow_up.served else "the model itself"
        rules += f", exact answers extracted by {by}/{extraction.RULES}"
    return PaperTask(name, rules, questions, digest(questions), stop, follow_up, data_set, judge)


def _follow_up(
    name: str, data_set: DataSet, rows: Sequence[Row], stop: tuple[str, ...], extractor: str | None
) -> Extraction | None:
    if extractor == "none" or (extractor is None and not data_set.shots):
        return None
    if not data_set.shots:
        raise BadInputError(f"the judge of {name} knows all of its answers: leave the extractor {extractor!r} out")
    served = find_served(extractor) if extractor not in (None, "same") else None
    return Extraction(tuple(row.question for row in rows), data_set.shots, data_set.model_judges, stop, served)


def _rows(name: str, data_set: DataSet, data: str | Path | None) -> Iterator[Row]:
    found = readers.fields_of(Path(data)) if data is not None else _hub(name, data_set)
    for where, fields in found:
        yield data_set.reader(fields, where)


def _hub(name: str, data_set: DataSet) -> Iterator[tuple[str, readers.Fields]]:
    if data_set.hub is None:
        raise BadInputError(f"the task {name} is on no hub: name its file, {data_set.source}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HiddenlakeError(
            f"the task {name} comes from the Hugging Face hub by the package datasets, which is not installed: "
            f"pip install 'hiddenlake[datasets]', or name its file"
        ) from error
    path, configuration, split = data_set.hub
    for number, fields in enumerate(load_dataset(path, configuration, split=split), 1):
        yield f"{path}, row {number}", fields
