"""Extraction: a language model reads the exact answer out of a long one, and says whether it is right where words differ.

Source: section 3.2 and the code of "LLMs Know More Than They Show" (arXiv:2410.02707), with three differences: the first
reply is greedy and only later ones are drawn, so that most marks depend on no seed; a reply that was cut is not accepted;
and `NO ANSWER` leaves the exact answer absent at once. The prompts' examples are our own.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.inquiry import Ask, Inquiry, Reply, ServedModel
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.spans import find_ignoring_case

# Part of the value identity: raised when the same replies, or other prompts, may give another exact answer or verdict.
RULES = 1

TRIES = 5
_NO_ANSWER = "NO ANSWER"
_NAME_TOKENS, _VERDICT_TOKENS = 48, 4

# Questions without their contexts and answers of up to 200 tokens need half of it.
_LONGEST = 1024

_EXTRACT = (
    "Extract from the following long answer the short answer, only the relevant tokens. If the long answer does not "
    "answer the question, output NO ANSWER."
)
_MARK = (
    "You are given a question, its correct answer and the answer of a model. Output 1 if the model's answer means the "
    "same as the correct answer, even in other words, and 0 if it does not. Output nothing else."
)


@dataclass(frozen=True, slots=True)
class Shot:
    """An example: what was asked and said, and what there is to extract."""

    question: str
    answer: str
    exact: str


FACTS = (
    Shot(
        "Which river runs through the capital of Hungary?",
        "The capital of Hungary is Budapest, and the river that runs through it is the Danube.",
        "the Danube",
    ),
    Shot(
        "What is the capital of Australia?",
        "Sydney is the capital of Australia. It lies on the south-eastern coast and is known for its opera house.",
        "Sydney",
    ),
    Shot(
        "Who designed the first steam engine that was used in a mine?",
        "I am sorry, but I do not know enough about early steam engines to say who designed it.",
        _NO_ANSWER,
    ),
)
ROLES = (
    Shot(
        "Who acted as Ellen Ripley in the movie Alien?",
        "In the film from 1979, the part of Ellen Ripley was played by Sigourney Weaver.",
        "Sigourney Weaver",
    ),
    Shot(
        "Who acted as Rick Blaine in the movie Casablanca?",
        "Rick Blaine, the owner of the bar, was played by the actor Cary Grant (1904-1986).",
        "Cary Grant",
    ),
    Shot(
        "Who acted as the neighbour in the movie The Window?",
        "There are several movies of that name. Which one do you mean?",
        _NO_ANSWER,
    ),
)
NUMBERS = (
    Shot(
        "Tom has 4 boxes of 12 pencils and gives 9 pencils away. How many pencils has he left?",
        "Tom has 4 * 12 = 48 pencils at first. After he gives 9 away, he has 48 - 9 = 39 pencils left.",
        "39",
    ),
    Shot(
        "A train needs 3 hours for 210 km. How many km does it make in an hour?",
        "The speed is the distance over the time, so the train makes 80 km in an hour.",
        "80",
    ),
    Shot(
        "Eva buys some apples for 6 euros. How many does she buy?",
        "The price of one apple is not given, so this cannot be said.",
        _NO_ANSWER,
    ),
)

# (question, correct answer, answer, verdict)
_VERDICTS = (
    ("when did the war end", "8 May 1945", "The war ended in May of 1945, on the eighth.", 1),
    ("who wrote the song", "Carole King", "The song was written by Joni Mitchell.", 0),
)


@dataclass(frozen=True, slots=True)
class Extraction:
    """A paper task's follow-up: see FollowUp.

    questions : by index, as in the data set's file: without context or prompt.
    shots : of the data set's kind.
    judges : whether the model also says if an answer is right in which the gold one was not found.
    stop : of a model without a chat template, whose answers are their first lines.
    """

    questions: tuple[str, ...]
    shots: tuple[Shot, ...]
    judges: bool
    stop: tuple[str, ...]
    served: ServedModel | None = None
    longest: int = _LONGEST

    def inquire(self, question: Question, answer: str, judgement: Judgement) -> Inquiry:
        """Where the judge found an exact answer it stands; elsewhere the model is asked for it."""
        asked, shown = self.questions[question.index], answer.strip()
        shown = shown.split("\n")[0] if self.stop else shown
        if judgement.exact_answer is not None or not shown:
            return judgement
        correct = judgement.correct
        if self.judges and not correct:
            correct = yield from mark(asked, question.answers, shown, self.stop)
        return Judgement(correct, (yield from extract(asked, shown, self.shots, self.stop)))


def extract(
    question: str, answer: str, shots: Sequence[Shot], stop: tuple[str, ...]
) -> Generator[Ask, Reply | None, str | None]:
    """The exact answer that a model finds in an answer, as it is spelled there; None where it finds none in 5 tries."""
    for sampling in _tries(stop):
        reply = yield Ask(extraction_prompt(question, answer, shots), _NAME_TOKENS, sampling)
        if reply is None:
            return None
        name = short_answer(reply)
        if name is not None and name.upper() == _NO_ANSWER:
            return None
        if name and (found := find_ignoring_case(answer, name)) is not None:
            return answer[slice(*found)]
    return None


def mark(question: str, gold: Sequence[str], answer: str, stop: tuple[str, ...]) -> Generator[Ask, Reply | None, bool]:
    """Whether a model says that an answer is right; False where it says neither in 5 tries."""
    for sampling in _tries(stop):
        reply = yield Ask(mark_prompt(question, gold, answer), _VERDICT_TOKENS, sampling)
        if reply is None:
            return False
        if (verdict := reply.text.strip()[:1]) in ("0", "1"):
            return verdict == "1"
    return False


def short_answer(reply: Reply) -> str | None:
    """A reply's first line, without what stands in parentheses, quotes around it and a full stop behind it.

    None where the reply was cut before that line was complete.
    """
    line, ended, _ = reply.text.strip().partition("\n")
    name, opened, _ = line.partition("(")
    if not (reply.ended or ended or opened):
        return None
    return name.strip().strip('."').strip()


def extraction_prompt(question: str, answer: str, shots: Sequence[Shot]) -> str:
    """What is alike for all questions comes first, so that an engine may keep it."""
    examples = [f"Q: {shot.question}\nA: {shot.answer}\nShort answer: {shot.exact}" for shot in shots]
    return "\n\n".join([_EXTRACT, *examples, f"Q: {question}\nA: {answer}\nShort answer:"])


def mark_prompt(question: str, gold: Sequence[str], answer: str) -> str:
    """As `extraction_prompt`."""
    shots = [
        f"Question: {asked}\nCorrect answer: {right}\nModel's answer: {said}\nOutput: {verdict}"
        for asked, right, said, verdict in _VERDICTS
    ]
    last = f"Question: {question}\nCorrect answer: {', or '.join(gold)}\nModel's answer: {answer}\nOutput:"
    return "\n\n".join([_MARK, *shots, last])


def _tries(stop: tuple[str, ...]) -> list[Sampling]:
    """Greedy, then drawn at temperature 1 as the paper draws, each with another seed."""
    return [Sampling(stop=stop), *(Sampling(1.0, seed=k, stop=stop) for k in range(1, TRIES))]
