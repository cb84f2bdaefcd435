"""Stored cells beside a reference: every site, layer, position and token of some samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from _reference import relative_error

from hiddenlake.cache.model import Model
from hiddenlake.cache.positions import EXACT_ANSWER, POOLS
from hiddenlake.cache.store.reader import Capture

# Relative L2 error of a float32 row, pooled ones too. Rounding does 3e-5 at most in SmolLM2, whose streams differ most
# in size from token to token; another token's row is off by 0.1 at least.
TOLERANCE = 1e-4

# Log-probabilities in float32, of a vocabulary of 49152.
_LOGPROB = 1e-3

# Wrong ones that are told apart.
_NAMED = 20


@dataclass
class Compared:
    """samples : compared.  rows : one of a site, a layer and a position or token each.
    wrong : of them, and of cells that should be absent.  absent : cells that are, and rightly so.
    worst : relative L2 error.
    answers : whose positions mean other tokens than they should, or whose tokens or log-probabilities are not the
        reference's.
    causes : of the first that are wrong.
    """

    samples: int = 0
    rows: int = 0
    wrong: int = 0
    absent: int = 0
    worst: float = 0.0
    answers: int = 0
    causes: list[str] = field(default_factory=list)

    def values(self, name: str, found: np.ndarray, expected: np.ndarray) -> None:
        """found, expected : (..., width)."""
        errors = relative_error(found, expected)
        wrong = int((~(errors <= TOLERANCE)).sum())
        self.rows += errors.size
        self.wrong += wrong
        self.worst = max(self.worst, float(np.nan_to_num(errors, nan=np.inf).max(initial=0)))
        if wrong:
            self.note(f"{name}: {wrong} of {errors.size} rows, by up to {errors.max():.2e}")

    def nothing(self, name: str, found: np.ndarray) -> None:
        """found : (..., width), of an absent position."""
        there = int((~np.isnan(found).all(-1)).sum())
        self.absent += found[..., 0].size - there
        self.wrong += there
        if there:
            self.note(f"{name}: absent, and yet there")

    def note(self, cause: str) -> None:
        if len(self.causes) < _NAMED:
            self.causes.append(cause)


def compare(
    capture: Capture, model: Model, reference: Callable[[Sequence[int]], dict[str, np.ndarray]], keys: Sequence[str]
) -> Compared:
    """Everything that is stored of some samples.

    reference : token ids to {site: (layer, token, width)}, without layer where the site has none, and `logits`.
    """
    coverage = capture.coverage
    sites = (*coverage.sites, "embed")
    cells, tokens = {}, {}
    if coverage.positions:
        cells = {site: capture.read(site, samples=keys, dtype="float32") for site in sites}
    if coverage.tokens:
        tokens = {site: capture.read_tokens(site, samples=keys, dtype="float32") for site in sites}
    found = Compared(len(keys))
    sampling = capture.identity["decoding"]["sampling"]
    greedy = sampling == "greedy" or (sampling != "given" and "temperature" not in sampling)
    samples = {sample["key"]: sample for sample in capture.samples().to_pylist()}
    for i, key in enumerate(keys):
        sample = samples[key]
        expected = reference(sample["token_ids"])
        if wrong := _what_is_wrong(sample, coverage.positions, model, expected["logits"], greedy):
            found.answers += 1
            found.note(f"{key}: {wrong}")
        for site in sites:
            rows = expected[site][list(coverage.layers)] if expected[site].ndim == 3 else expected[site]
            for p, (name, token) in enumerate(zip(coverage.positions, sample["token_index"], strict=True)):
                cell, label = cells[site][..., p, i, :], f"{key} {site} {name}"
                if token == -1:
                    found.nothing(label, cell)
                    continue
                row = rows[..., token, :] if token >= 0 else _pool(name, rows, sample, coverage.positions)
                found.values(label, cell, row)
            if tokens:
                part = slice(*tokens[site].offsets[i : i + 2])
                index = tokens[site].token_index[part]
                wanted = coverage.tokens.indices(sample["prompt_length"], sample["total_length"])
                if not np.array_equal(index, wanted):
                    found.answers += 1
                    found.note(f"{key} {site}: holds the tokens {index}")
                found.values(f"{key} {site} tokens", tokens[site].values[..., part, :], rows[..., index, :])
    return found


def _what_is_wrong(
    sample: dict[str, Any], names: Sequence[str], model: Model, logits: np.ndarray, greedy: bool
) -> str | None:
    """With a sample's tokens and their places, by hand, without the code that placed them."""
    q, n, ids = sample["prompt_length"], sample["total_length"], sample["token_ids"]
    index = dict(zip(names, sample["token_index"], strict=True))
    for name, token in index.items():
        if name in POOLS or name in EXACT_ANSWER:
            continue
        expected = {"last_q": q - 1, "first_answer": q, "second_answer": q + 1}.get(name)
        if expected is None:
            expected = int(name) + (n if name.startswith("-") else 0)
        if token != (expected if 0 <= expected < n else -1):
            return f"{name} is token {token} of {q} + {n - q}"
    if set(EXACT_ANSWER) <= index.keys():
        before, first, last, after = (index[name] for name in EXACT_ANSWER)
        if not sample["exact_answer_valid"]:
            if {before, first, last, after} != {-1}:
                return "there is no exact answer, but it has a place"
        elif sample["exact_answer"].lower() not in model.decode(ids[first : last + 1]).lower():
            return f"{sample['exact_answer']!r} is not at {first} to {last}"
        elif (before, after) != (first - 1, last + 1 if last + 1 < n else -1):
            return f"{before} and {after} are not beside the exact answer, {first} to {last}"
    if sample["status"] != "complete":
        return sample["status"]
    every = logits[q - 1 : n - 1].astype(np.float64)
    chosen = every[np.arange(n - q), ids[q:]]
    if greedy and (every.max(-1, initial=-np.inf) - chosen > _LOGPROB).any():
        return "its answer is not the model's"
    worst = float(np.abs(chosen - np.logaddexp.reduce(every, axis=-1) - sample["logprobs"]).max(initial=0))
    return f"its log-probabilities are off by {worst:.1e}" if worst > _LOGPROB else None


def _pool(name: str, rows: np.ndarray, sample: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    """(layer, width). rows : (layer, token, width), without layer where the site has none."""
    how, span = POOLS[name]
    q, n = sample["prompt_length"], sample["total_length"]
    if span == "exact_answer":
        first, last = (sample["token_index"][names.index(f"exact_answer_{edge}")] for edge in ("first", "last"))
        start, stop = first, last + 1
    else:
        start, stop = {"prompt": (0, q), "answer": (q, n), "all": (0, n)}[span]
    part = rows[..., start:stop, :]
    return part.mean(-2) if how == "mean" else part.max(-2)
