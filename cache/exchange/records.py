"""Records: what a line of JSON says of an imported sample, checked, and the identity that stands for all of them."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiddenlake.cache import positions as rules
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store.coverage import Coverage

# Told apart from a model that has none: each must be given, be it as null.
_IDENTITY = ("model", "weights", "quantization", "lora", "compute_dtype", "chat_template", "task")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")

# Longest line of a JSONL file. A million token ids take about 8 MB.
_LINE_BYTES = 64 << 20


def _is_text(value: Any) -> bool:
    # JSON can spell half a surrogate pair, which no file of ours can hold
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_number(value: Any) -> bool:
    # NaN is what nobody knows
    return type(value) in (int, float) and not math.isinf(value)


# field -> (whether a value can be one, in words, the value where there is none)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "key": (lambda value: _is_text(value) and 0 < len(value) <= 256, "a string of 1 to 256 characters", None),
    "index": (_is_count, "a whole number from 0", None),
    "sample_index": (_is_count, "a whole number from 0", 0),
    "group": (_is_text, "a string", ""),
    "prompt": (_is_text, "a string", ""),
    "answer": (_is_text, "a string", ""),
    "answers": (_is_list(_is_text), "a list of strings", []),
    "correct": (lambda value: isinstance(value, bool), "true, false or null", None),
    "exact_answer": (_is_text, "a string or null", None),
    "exact_answer_tokens": (
        lambda value: _is_list(_is_count)(value) and len(value) == 2,
        "[first, last] indices into token_ids, or null",
        None,
    ),
    "token_ids": (_is_list(_is_count), "a list of whole numbers from 0", None),
    "logprobs": (_is_list(_is_number), "a list of numbers", None),
    "prompt_length": (lambda value: _is_count(value) and value > 0, "a whole number from 1", None),
    "exact_answer_valid": (lambda value: isinstance(value, bool), "true or false", None),
    "status": (_is_text, "a string", "complete"),
    "finish_reason": (_is_text, "a string", "unknown"),
    "token_index": (_is_list(lambda value: type(value) is int), "a list of whole numbers", None),
}


def known_fields() -> set[str]:
    """Names of the fields that a sample has."""
    return set(_FIELDS)


def read_fields(line: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a line that a sample has; null stands for none. Raises BadInputError for one of another type."""
    found = {}
    for name, (fits, words, default) in _FIELDS.items():
        value = line.get(name)
        if value is not None and not fits(value):
            raise BadInputError(f"{where}: {name} is {_short(value)}: expected {words}")
        found[name] = default if value is None else value
    return found


def make_sample(fields: Mapping[str, Any], coverage: Coverage, where: str, *, lacks_last: bool = False) -> Sample:
    """A sample of what `read_fields` found. What a line does not say stays empty: "" for texts, NaN for logprobs.

    lacks_last : whether the last token has no activation, so that every position that needs it is absent.

    Raises BadInputError where the fields do not fit each other.
    """
    ids, q = fields["token_ids"], fields["prompt_length"]
    if ids is None or q is None or fields["key"] is None or fields["index"] is None:
        raise BadInputError(f"{where}: expected key, token_ids and prompt_length")
    n = len(ids)
    if not 1 <= q <= n:
        raise BadInputError(f"{where}: prompt_length is {q}, but there are {n} token_ids")
    logprobs = fields["logprobs"]
    if logprobs is not None and len(logprobs) != n - q:
        raise BadInputError(f"{where}: {len(logprobs)} logprobs for the {n - q} tokens of the answer")
    window = fields["exact_answer_tokens"]
    if window is not None and not q <= window[0] <= window[1] < n:
        raise BadInputError(f"{where}: exact_answer_tokens {window} do not lie in the answer, tokens {q} to {n - 1}")
    span = None if window is None else tuple(window)
    index = fields["token_index"]
    if index is None:
        index = rules.resolve(coverage.positions, q, n, span).tolist()
    try:
        coverage.check_token_index(index, n)
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error
    if lacks_last:
        index = [
            rules.ABSENT if n - 1 in (rules.span_of(name, q, n, span) if token == rules.POOLED else (token,)) else token
            for name, token in zip(coverage.positions, index, strict=True)
        ]
    return Sample(
        key=fields["key"],
        index=fields["index"],
        sample_index=fields["sample_index"],
        group=fields["group"],
        prompt=fields["prompt"],
        answer=fields["answer"],
        answers=tuple(fields["answers"]),
        correct=fields["correct"],
        exact_answer=fields["exact_answer"],
        exact_answer_valid=window is not None if fields["exact_answer_valid"] is None else fields["exact_answer_valid"],
        token_ids=tuple(ids),
        logprobs=(math.nan,) * (n - q) if logprobs is None else tuple(map(float, logprobs)),
        prompt_length=q,
        total_length=n,
        finish_reason=fields["finish_reason"],
        token_index=tuple(index),
        status=fields["status"],
    )


class Lines:
    """A JSONL file whose lines are parsed when they are asked for: only where each starts is kept.

    ignored : names of fields that no sample has.
    progress : how far `scan` is, (done, total), in bytes.
    """

    def __init__(self, path: Path, used: Sequence[str] = ()) -> None:
        self.path = path
        self.ignored: set[str] = set()
        self.progress = (0, 0)
        self._known = {*_FIELDS, *used}
        self._starts: list[int] = []
        self._numbers: list[int] = []

    def scan(self) -> Iterator[tuple[int, dict[str, Any], str]]:
        """Every line for the first time: (its number among those that are not empty, the object, `file, line n`)."""
        start = 0
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for number, raw in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), 1):
                    where = f"{self.path}, line {number}"
                    if len(raw) > _LINE_BYTES:
                        raise BadInputError(f"{where} is longer than {_LINE_BYTES} bytes: expected one sample a line")
                    if raw.strip():
                        self._starts.append(start)
                        self._numbers.append(number)
                        self.progress = (start + len(raw), size)
                        line = _parse(raw, where)
                        self.ignored |= line.keys() - self._known
                        yield len(self._starts) - 1, line, where
                    start += len(raw)
        except OSError as error:
            raise BadInputError(f"{self.path}: {error.strerror}: expected a JSONL file") from error

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        """One line again, as `scan` gave it."""
        where = f"{self.path}, line {self._numbers[row]}"
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[row])
                return _parse(file.readline(_LINE_BYTES + 1), where), where
        except OSError as error:
            raise BadInputError(f"{where}: {error.strerror}: the file must stay until the import is done") from error


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where} is no JSON ({error}): expected one object a line") from error
    if not isinstance(line, dict):
        raise BadInputError(f"{where} is no JSON object: expected one object a line")
    return line


def load_identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a JSON file, complete. Raises BadInputError, naming the fields that are missing."""
    path = Path(path)
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: {error}: expected a JSON file with {', '.join(_IDENTITY)}") from error
    if not isinstance(given, dict):
        raise BadInputError(f"{path} is no JSON object: expected one with {', '.join(_IDENTITY)}")
    check_identity(given)
    return given


def check_identity(given: Mapping[str, Any]) -> None:
    """Raise BadInputError unless everything is said that makes two activations the same numbers. Nothing is filled in: a
    model without quantisation says null."""
    if missing := [name for name in _IDENTITY if name not in given]:
        raise BadInputError(
            f"the identity lacks {', '.join(missing)}: expected {', '.join(_IDENTITY)}, null where there is none; "
            f"nothing about how activations came about is guessed"
        )
    if given["compute_dtype"] not in COMPUTE_DTYPES:
        raise BadInputError(
            f"compute_dtype is {_short(given['compute_dtype'])}: expected one of {', '.join(COMPUTE_DTYPES)}"
        )


def complete_identity(given: Mapping[str, Any], stored_dtype: str, format: str) -> dict[str, Any]:
    """The value identity of an imported capture: what was given, what is stored, and that it was imported.

    Raises BadInputError where it says something else.
    """
    for name, value in {"stored_dtype": stored_dtype, "imported": format}.items():
        if given.get(name, value) != value:
            raise BadInputError(f"the identity says that {name} is {_short(given[name])}, but it is {value!r}")
    defaults = {"position_rules": rules.RULES_VERSION}
    return defaults | dict(given) | {"stored_dtype": stored_dtype, "imported": format}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
