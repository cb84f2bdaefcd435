"""Asking: the inquiries of one run, put to the engine that captures or to another model, while captures go on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hiddenlake.cache.engines.base import Engine
from hiddenlake.cache.inquiry import Ask, Asked, FollowUp, Inquiry, Reply
from hiddenlake.cache.samples import Generation, Judgement, Prompt

# A generation, its text as its reader sees it, and what it was found to be.
Judged = tuple[Generation, str, Judgement]


class Asker(Protocol):
    """Who is asked.

    steps : whether replies come about by the engine's steps.
    """

    steps: bool

    def ask(self, key: str, ask: Ask, seed: int | None) -> bool:
        """Put one question about a sample. Returns whether it was short enough."""

    def replies(self, wait: bool) -> list[tuple[str, Reply | None]]:
        """(key, reply) of what was replied since the last call; None where the question was too long after all.

        wait : until there is one.
        """

    def close(self) -> None:
        """Give up what was not replied."""


class EngineAsker:
    """The engine that captures is asked, and batches replies with captures.

    A sample in flight is one request at a time, its answer or a question about it, so that a ring full of samples that wait
    for replies leaves the engine as much to do as one full of answers.
    """

    steps = True

    def __init__(self, engine: Engine, longest: int) -> None:
        self.engine = engine
        self._longest = min(longest, engine.request.model.context)

    def ask(self, key: str, ask: Ask, seed: int | None) -> bool:
        _, ids = self.engine.request.model.encode(ask.text)
        if len(ids) + ask.max_new_tokens > self._longest:
            return False
        self.engine.ask(key, ids, ask, seed)
        return True

    def replies(self, wait: bool) -> list[tuple[str, Reply | None]]:
        return [*self.engine.replies()]

    def close(self) -> None:
        """What the engine still works on ends with it."""


@dataclass(slots=True)
class _Open:
    prompt: Prompt
    generation: Generation
    answer: str
    inquiry: Inquiry


class Asking:
    """Answers about which a model is still being asked: their rows wait in the engine. len : how many.

    follow_up, asker : both None where there is nothing to ask.  asked : counts.
    """

    def __init__(self, follow_up: FollowUp | None, asker: Asker | None) -> None:
        self._follow_up, self._asker = follow_up, asker
        self.asked = Asked()
        self._open: dict[str, _Open] = {}
        self._ended: list[Judged] = []

    def __len__(self) -> int:
        return len(self._open)

    @property
    def in_engine(self) -> bool:
        """Whether replies come about by the engine's steps."""
        return self._asker is not None and self._asker.steps

    def begin(self, prompt: Prompt, generation: Generation, answer: str, judgement: Judgement) -> None:
        """A judged answer, which may be marked at once: then `ended` has it."""
        if self._follow_up is None:
            self._ended.append((generation, answer, judgement))
            return
        inquiry = self._follow_up.inquire(prompt.question, answer, judgement)
        self._go_on(_Open(prompt, generation, answer, inquiry), None)

    def ended(self, wait: bool) -> Sequence[Judged]:
        """Answers about which nothing is left to ask. wait : for a reply at least, where none has ended."""
        wait = wait and bool(self._open) and not self._ended
        for key, reply in self._asker.replies(wait) if self._asker is not None else ():
            if reply is None:
                self.asked.too_long += 1
            else:
                self.asked.questions += 1
                self.asked.prompt_tokens += reply.prompt_tokens
                self.asked.tokens += reply.tokens
            self._go_on(self._open.pop(key), reply)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Ask no more."""
        if self._asker is not None:
            self._asker.close()

    def _go_on(self, item: _Open, reply: Reply | None) -> None:
        """Send the reply, and put the next question that is short enough."""
        question, sample_index = item.prompt.question, item.prompt.sample_index
        while True:
            try:
                ask = item.inquiry.send(reply)
            except StopIteration as end:
                self._ended.append((item.generation, item.answer, end.value))
                return
            if self._asker.ask(item.prompt.key, ask, ask.sampling.seed_of(question.index, sample_index)):
                self._open[item.prompt.key] = item
                return
            self.asked.too_long += 1
            reply = None
