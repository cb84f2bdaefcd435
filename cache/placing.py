"""Placing: an answer and its judgement become a sample, and each of its positions a token."""

from collections.abc import Sequence
from dataclasses import dataclass

from hiddenlake.cache import positions as rules
from hiddenlake.cache.model import Model
from hiddenlake.cache.samples import Generation, Judgement, Prompt, Sample
from hiddenlake.cache.spans import find_window
from hiddenlake.cache.store.layout import Coverage
from hiddenlake.cache.worker.plan import Piece, Placement


@dataclass(frozen=True, slots=True)
class Placed:
    """What is stored of one sample.

    layers : of the coverage.
    token_index : (position,) as positions.resolve.
    pools : (position, function, start, stop) of each pooled position that is present.
    tokens : token indices of token-level data.
    status : `complete`, or why a cell that the rules could have filled is absent.
    """

    prompt_length: int
    layers: tuple[int, ...]
    token_index: tuple[int, ...]
    pools: tuple[tuple[int, str, int, int], ...]
    tokens: range
    status: str

    def tokens_needed(self) -> list[int]:
        """Every token whose row is read when the sample is stored, ascending. Prompts are pooled as they go by."""
        needed = {token for token in self.token_index if token >= 0} | set(self.tokens)
        for _, _, start, stop in self.pools:
            needed.update(range(max(start, self.prompt_length), stop))
        return sorted(needed)

    def placement(
        self, sample: Sample, handle: int | None, slot: int, pieces: Sequence[Piece] = (), done: bool = True
    ) -> Placement:
        """Where the engine shall put the sample's rows. handle : None where only the pieces are placed."""
        return Placement(
            key=sample.key,
            token_ids=sample.token_ids,
            prompt_length=self.prompt_length,
            layers=self.layers,
            token_index=self.token_index,
            pools=self.pools,
            handle=handle,
            slot=slot,
            pieces=tuple(pieces),
            done=done,
        )


def place(
    coverage: Coverage, prompt_length: int, total_length: int, window: tuple[int, int] | None, last_fed: bool
) -> Placed:
    """Which tokens a sample's positions mean.

    window : inclusive token window of the exact answer in the whole sequence, or None.
    last_fed : whether the sequence's last token has an activation.
    """
    q, n = prompt_length, total_length
    index = rules.resolve(coverage.positions, q, n, window)
    pools = []
    lost = False
    for p, name in enumerate(coverage.positions):
        token = int(index[p])
        span = rules.span_of(name, q, n, window) if token == rules.POOLED else range(token, token + 1)
        if not last_fed and n - 1 in span:
            index[p] = rules.ABSENT
            lost = True
        elif token == rules.POOLED:
            pools.append((p, rules.POOLS[name][0], span.start, span.stop))
    tokens = range(0) if coverage.tokens is None else coverage.tokens.indices(q, n)
    if not last_fed and n - 1 in tokens:
        tokens, lost = tokens[:-1], True
    status = "the context is full: the last token has no activation" if lost else "complete"
    return Placed(q, coverage.layers, tuple(index.tolist()), tuple(pools), tokens, status)


def make_sample(
    model: Model, coverage: Coverage, prompt: Prompt, generation: Generation, answer: str, judgement: Judgement
) -> tuple[Sample, Placed]:
    """The row of samples/ for one answer, and where its cells come from.

    answer : as its reader sees it.
    """
    answer_ids = generation.answer_ids
    question = prompt.question
    q = len(prompt.token_ids)
    n = q + len(answer_ids)
    window = None
    if judgement.exact_answer is not None and answer_ids:
        window = find_window(model.decode, answer_ids, judgement.exact_answer)
        window = window and (q + window[0], q + window[1])
    placed = place(coverage, q, n, window, last_fed=prompt.given is not None or n < model.context)
    sample = Sample(
        key=prompt.key,
        index=question.index,
        sample_index=prompt.sample_index,
        group=question.group,
        prompt=prompt.text,
        answer=answer,
        answers=question.answers,
        correct=judgement.correct,
        exact_answer=judgement.exact_answer,
        exact_answer_valid=window is not None,
        token_ids=(*prompt.token_ids, *answer_ids),
        logprobs=generation.logprobs,
        prompt_length=q,
        total_length=n,
        finish_reason=generation.finish_reason,
        token_index=placed.token_index,
        status=placed.status,
    )
    return sample, placed
