"""Samples: one prompt and one generation, from the question that was asked to the row that is stored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hiddenlake.cache.identity import Sampling


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a task.

    index : the row's number in the task; folds and order follow it, never the order of arrival.
    question : what the model is asked, before any chat template.
    answers : the gold answer and its aliases.
    wrong_answers : other answers that can be recognised in a text, where the task knows them.
    group : samples of one group never lie on both sides of a split.
    given : the answer, where it is given and not to be generated; "" for a plain text, which is all prompt.
    """

    index: int
    question: str
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...] = ()
    group: str = ""
    given: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says of one answer. `correct` is None where nothing is right or wrong, `exact_answer` where none was
    found."""

    correct: bool | None
    exact_answer: str | None


class Task(Protocol):
    """A question set and its judge.

    name : shown in captures, grids and pictures.
    rules : name and version of the judge and the exact-answer rule: part of the value identity.
    questions : in task order; `questions[i].index == i`.

    A task whose judge wants a language model's help has a `follow_up` besides: see hiddenlake.cache.inquiry.FollowUp.
    """

    name: str
    rules: str
    questions: Sequence[Question]

    def judge(self, question: Question, answer: str) -> Judgement: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One generation to be made, with the token ids that the model will really see.

    key : the sample's key, known before the answer exists.
    given : the answer's token ids, where it is given and not to be generated.
    seed : of a sampled answer, where it does not follow from the question's row.
    """

    key: str
    question: Question
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    given: tuple[int, ...] | None = None
    seed: int | None = None

    def seed_of(self, sampling: Sampling) -> int | None:
        """The seed of this answer; None for greedy decoding."""
        return self.seed if self.seed is not None else sampling.seed_of(self.question.index, self.sample_index)


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer, as the engine made it: ids with the end-of-sequence token, if there was one.

    logprobs : log-probability of each answer token under the model, natural logarithm.
    text : the answer as its reader sees it, or None where it is what the ids spell; a stop string is cut off from it,
        and may have ended inside a token.
    """

    key: str
    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of `samples/<shard>.parquet`: everything about a sample but its activations.

    token_ids : prompt + answer.  logprobs : one per answer token.
    token_index : (position,) index into token_ids, -1 where the position is absent.
    status : `complete`, or why a cell that the rules could have filled is absent.
    """

    key: str
    index: int
    sample_index: int
    group: str
    prompt: str
    answer: str
    answers: tuple[str, ...]
    correct: bool | None
    exact_answer: str | None
    exact_answer_valid: bool
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_length: int
    total_length: int
    finish_reason: str
    token_index: tuple[int, ...]
    status: str = "complete"

    def __post_init__(self) -> None:
        if self.total_length != len(self.token_ids):
            raise ValueError(f"total_length {self.total_length} differs from {len(self.token_ids)} token ids")
        if len(self.logprobs) != self.total_length - self.prompt_length:
            raise ValueError(
                f"{len(self.logprobs)} logprobs do not match {self.total_length - self.prompt_length} answer tokens"
            )

    @property
    def checksum(self) -> str:
        """Hash of the ids that the model really saw, stored beside them and verified."""
        return token_checksum(self.token_ids)


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that could not be captured, and why. `attempts` counts the generations that were tried."""

    key: str
    index: int
    cause: str
    attempts: int


def token_checksum(token_ids: Sequence[int]) -> str:
    """32 hex digits of SHA-256 over the ids as little-endian int32."""
    return hashlib.sha256(np.asarray(token_ids, "<i4").tobytes()).hexdigest()[:32]
