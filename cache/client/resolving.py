"""Resolving: activations of prompts, from wherever a service has them, or computed."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hiddenlake.cache.client.asking import Ask, Steps, ask_plainly
from hiddenlake.cache.errors import BadInputError, StoreError

_PATH = "/v1/activations:resolve"

# The service holds a request for so long before it says that something is still being computed.
_HELD_SECONDS = 20.0

# Messages, a text, or a dict as the service takes it.
Input = str | Sequence[Mapping[str, str]] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one answer lies. input : number of the input.  sample_index : of the answer to it.  sample : its key there."""

    input: int
    sample_index: int
    key: str
    capture: str
    sample: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where the answers lie, in the order of the inputs.

    sites, layers, positions, tokens : what was asked for, and is there.
    """

    model: str
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    tokens: str | None
    entries: tuple[Entry, ...]


def resolve_body(
    inputs: Iterable[Input],
    *,
    model: str | None = None,
    sites: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[str | int] | None = None,
    generation: Mapping[str, Any] | None = None,
    only_if_cached: bool = False,
) -> dict[str, Any]:
    """What is sent. Raises BadInputError for what is no input."""
    body: dict[str, Any] = {"inputs": [_input(item) for item in inputs], "only_if_cached": only_if_cached}
    given = {"model": model, "generation": None if generation is None else dict(generation)}
    given |= {
        name: None if values is None else list(values)
        for name, values in (("sites", sites), ("layers", layers), ("positions", positions))
    }
    return body | {name: value for name, value in given.items() if value is not None}


def _input(item: Input) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, Sequence):
        return {"messages": [dict(message) for message in item]}
    raise BadInputError(
        f"an input is a {type(item).__name__}: expected a text, a list of messages, or a dict of the service's"
    )


def ask_resolve(body: dict[str, Any], patience: float) -> Steps:
    """Asks until all is there. patience : seconds. Raises StoreError once they are over; what was computed stays."""
    end = time.monotonic() + patience
    while True:
        wait = max(0.0, min(_HELD_SECONDS, end - time.monotonic()))
        found = json.loads((yield from ask_plainly(Ask("POST", _PATH, body=body | {"wait": wait}, good=(200, 202)))))
        if found["state"] == "complete":
            break
        if time.monotonic() >= end:
            missing = sum(entry["state"] != "ready" for entry in found["entries"])
            raise StoreError(
                f"{missing} of {len(found['entries'])} answers are still being computed after {patience:g} seconds (job "
                f"{found['job']}): ask again, or wait for longer"
            )
    names = Entry.__slots__
    entries = tuple(Entry(**{name: entry[name] for name in names}) for entry in found["entries"])
    lists = {name: tuple(found[name]) for name in ("sites", "layers", "positions")}
    return Resolved(found["model"], **lists, tokens=found["tokens"], entries=entries)
