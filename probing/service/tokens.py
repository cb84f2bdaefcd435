"""Tokens: one sample's tokens, scored by a probe wherever there is a row."""

from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, Field

from hiddenlake.cache.positions import POOLED
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.probe import probability_of


class TokenScore(BaseModel):
    """A token of which there is an activation, and what the probe says of that."""

    token_index: int = Field(description="Into prompt and answer.")
    positions: list[str] = Field(description="The named positions that it is.")
    score: float = Field(description="Log-odds of the positive class.")
    probability: float


class TokenScores(BaseModel):
    """A probe's scores of a sample's tokens. A token without a row is not here: nothing is invented for it."""

    key: str
    site: str
    layer: int
    fitted_at: str = Field(description="The position whose rows the probe was fitted on.")
    positive_class: str
    probe: str = Field(description="Which probe it is, in a sentence.")
    rows: str = Field(description="Of which tokens there are rows, in a sentence.")
    marked: str | None = Field(None, description="What is wrong with these scores, where they were forced.")
    tokens: list[TokenScore]


def token_scores(
    capture: Capture, site: str, layer: int, row: int, score: Callable[[np.ndarray], np.ndarray]
) -> tuple[list[TokenScore], str]:
    """(scores of the tokens that have a row, of which tokens that is true).

    score : (n, d) float32 activations -> (n,) log-odds.

    Raises UnknownNameError where the site or the layer was not captured.
    """
    c, snapshot = capture.coverage, capture.snapshot
    rows: dict[int, np.ndarray] = {}
    names: dict[int, list[str]] = {}
    pooled = 0
    if c.positions:
        index = snapshot.cell_tokens[:, row].tolist()
        values = capture.read(site, layer, None, row, dtype="float32")
        for name, token, value in zip(c.positions, index, values, strict=True):
            pooled += token == POOLED
            if token >= 0:  # two positions that are one token have the same row
                rows[token] = value
                names.setdefault(token, []).append(name)
    if c.tokens is not None:
        found = capture.read_tokens(site, layer, row, dtype="float32")
        rows |= dict(zip(found.token_index.tolist(), found.values, strict=True))
    order = sorted(rows)
    odds = score(np.stack([rows[token] for token in order])) if order else np.empty(0)
    probability = probability_of(odds)
    tokens = [
        TokenScore(token_index=token, positions=names.get(token, []), score=float(z), probability=float(p))
        for token, z, p in zip(order, odds, probability, strict=True)
    ]
    parts = [f"the {len(c.positions)} named positions"] * bool(c.positions) + [f"the tokens `{c.tokens}`"] * bool(
        c.tokens
    )
    words = f"This capture holds {' and '.join(parts)}: {len(order)} tokens of this sample have a row."
    if pooled:
        words += f" {pooled} of the positions are means or maxima over many tokens, and belong to none."
    return tokens, words
