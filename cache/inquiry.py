"""Inquiry: what a task asks a language model about an answer, before the answer's positions are known."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import GREEDY, Sampling
from hiddenlake.cache.samples import Judgement, Question


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a language model.

    text : one user turn.
    max_new_tokens : longest reply, in tokens.
    sampling : how the reply is drawn. Its seed counts the tries: each sample has a seed of its own that follows from it.
    """

    text: str
    max_new_tokens: int
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BadInputError(f"max_new_tokens of a reply is {self.max_new_tokens}: expected at least 1")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a language model replied.

    text : without special tokens, and without a stop string and what follows it.
    ended : whether the model ended it; False where max_new_tokens cut it.
    prompt_tokens, tokens : of the question and of the reply.
    """

    text: str
    ended: bool
    prompt_tokens: int
    tokens: int


# Yields questions, one after another, is sent the reply to each (None where the question is too long to be asked), and
# returns what the answer is found to be. A function of the answer and the replies, so that it can be made again.
Inquiry = Generator[Ask, Reply | None, Judgement]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model behind an OpenAI-compatible server.

    url : up to and with /v1.  name : as the server calls it.
    """

    url: str
    name: str


class FollowUp(Protocol):
    """How a language model helps a task's judge. A Task that wants help has one as its attribute `follow_up`.

    What decides about replies (prompts, tries, the model where it is another) is named in the task's rules.

    longest : most tokens of a question and its reply together; what is longer is not asked, whatever the engine could
        take, so that it never depends on the other samples of a run.
    served : the model to ask, or None for the one that is captured.
    """

    longest: int
    served: ServedModel | None

    def inquire(self, question: Question, answer: str, judgement: Judgement) -> Inquiry:
        """judgement : the judge's own, which a model may complete."""


@dataclass(slots=True)
class Asked:
    """What a run asked.

    questions : that were replied, each try counted.  prompt_tokens, tokens : of these questions and their replies.
    too_long : questions that were not.
    """

    questions: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    too_long: int = 0
