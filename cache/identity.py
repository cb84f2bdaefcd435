"""Identity: what makes two activations the same numbers, and the keys that follow from it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiddenlake.cache import positions
from hiddenlake.cache.errors import BadInputError


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8 and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """32 hex digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one token is chosen. The default is greedy.

    temperature : 0 for greedy.
    top_p, top_k : as everywhere; 1.0 and 0 for all tokens.
    seed : of the whole run; each sample has a seed of its own that follows from it, its row and its number.
    stop : strings that end an answer, which does not show them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        if not 0 <= self.temperature < math.inf:
            raise BadInputError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise BadInputError(f"top_p is {self.top_p} and top_k {self.top_k}: expected 0 < top_p <= 1 and top_k >= 0")
        if not all(self.stop):
            raise BadInputError("a stop string is empty: every answer would end before it starts")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seed_of(self, index: int, sample_index: int) -> int | None:
        """The seed of one sample, below 2**31; None for greedy decoding."""
        if self.greedy:
            return None
        return int(digest([self.seed, index, sample_index])[:8], 16) & 0x7FFFFFFF

    def to_json(self) -> Any:
        """`greedy`, or the fields that matter."""
        chosen = {"stop": list(self.stop)} if self.stop else {}
        if not self.greedy:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return chosen or "greedy"


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers come about: part of the value identity.

    max_new_tokens : longest answer, in tokens; 0 for given text, which is fed and not generated; None where each request
        to a server says how it is answered.
    """

    max_new_tokens: int | None = 100
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise BadInputError(f"max_new_tokens is {self.max_new_tokens}: expected at least 1, or 0 for given text")

    def to_json(self) -> dict[str, Any]:
        sampling = {None: "served", 0: "given"}.get(self.max_new_tokens) or self.sampling.to_json()
        return {"max_new_tokens": self.max_new_tokens, "sampling": sampling}


@dataclass(frozen=True, slots=True)
class Identity:
    """The value identity of a capture.

    model : hub id, or the folder's name.
    weights : the hub's resolved commit, or the hash of the weight files.
    quantization, lora : method of quantised weights, and the adapter on them; None for neither.
    compute_dtype, stored_dtype : what the model computes in, and what is stored.
    chat_template : hash of the template that was applied, or None for plain text.
    task, judge : the task's name, and name and version of the rules that mark its answers.
    """

    model: str
    weights: str
    quantization: str | None
    lora: str | None
    compute_dtype: str
    stored_dtype: str
    chat_template: str | None
    task: str
    judge: str
    decoding: Decoding
    position_rules: int = positions.RULES_VERSION

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"decoding": self.decoding.to_json()}


def sample_key(identity: Identity, prompt_ids: Sequence[int], index: int | str, sample_index: int) -> str:
    """The key of a sample, known before its answer exists: 32 hex digits.

    Hashes the value identity, the prompt's ids, the task's row number and the sample's number within it.

    index : a request to a server has no row yet, and an id of its own instead, which no other request ever has.
    """
    ids = hashlib.sha256(np.asarray(prompt_ids, "<i4").tobytes()).hexdigest()
    return digest({"identity": identity.to_json(), "prompt": ids, "index": index, "sample": sample_index})


# What decides the numbers of an activation beside token ids and how an answer was drawn.
_MODEL_FIELDS = ("weights", "quantization", "lora", "compute_dtype", "stored_dtype", "position_rules")


def model_key(identity: Mapping[str, Any]) -> str:
    """Equal for captures, of whatever task, whose activations of the same tokens are the same numbers: 32 hex digits.

    identity : as Identity.to_json gives it.
    """
    # A hub's commit names weights among those of one repository only.
    weights = str(identity.get("weights"))
    name = None if weights.startswith("sha256:") else identity.get("model")
    return digest([name, *(identity.get(field) for field in _MODEL_FIELDS)])


def answer_key(
    model: str, decoding: Mapping[str, Any], prompt_ids: Sequence[int], given: Sequence[int] | None, seed: int | None
) -> str | None:
    """The key of one answer to one prompt, whatever task it was asked in: 32 hex digits.

    model : model_key.  decoding : as Decoding.to_json gives it.  given : ids of an answer that is fed.
    seed : of this answer (Sampling.seed_of), None for greedy decoding.

    None where the decoding does not say how an answer came about.
    """
    sampling = decoding["sampling"]
    if sampling == "served":
        return None
    if isinstance(sampling, Mapping):
        sampling = {name: value for name, value in sampling.items() if name != "seed"}
    ids = [hashlib.sha256(np.asarray(part, "<i4").tobytes()).hexdigest() for part in (prompt_ids, given or ())]
    return digest([model, decoding["max_new_tokens"], sampling, ids, seed])
