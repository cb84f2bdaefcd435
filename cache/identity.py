"""Identity: what makes two activations the same numbers, and the keys that follow from it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
class Decoding:
    """How answers are generated: part of the value identity."""

    max_new_tokens: int = 100
    sampling: str = "greedy"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BadInputError(f"max_new_tokens is {self.max_new_tokens}: expected at least 1")


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
        """A plain dict: nested dataclasses become objects."""
        return asdict(self)


def sample_key(identity: Identity, prompt_ids: Sequence[int], index: int, sample_index: int) -> str:
    """The key of a sample, known before its answer exists: 32 hex digits.

    Hashes the value identity, the prompt's ids, the task's row number and the sample's number within it.
    """
    ids = hashlib.sha256(np.asarray(prompt_ids, "<i4").tobytes()).hexdigest()
    return digest({"identity": identity.to_json(), "prompt": ids, "index": index, "sample": sample_index})
