"""States: what has become of each sample that was asked for, by key and by request."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# Samples that are remembered. What is committed can still be found in the captures; an older failure cannot.
_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class State:
    """capture : its name.  cause : why a sample failed."""

    state: Literal["pending", "committed", "failed"]
    capture: str
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """The keys of one request's samples, in the order of its answers. request : vLLM's id of it."""

    request: str
    capture: str
    keys: tuple[str, ...]


class States:
    """May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: OrderedDict[str, State] = OrderedDict()
        self._asked: OrderedDict[str, list[Asked]] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def begin(self, asked: Asked, ids: Sequence[str]) -> None:
        """Samples are pending from now on. ids : under which `of_request` finds them."""
        with self._lock:
            for key in asked.keys:
                self._states[key] = State("pending", asked.capture)
                self._counts["pending"] += 1
            for name in ids:
                self._asked.setdefault(name, []).append(asked)
            while len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
            while len(self._states) > _REMEMBERED and next(iter(self._states.values())).state != "pending":
                self._states.popitem(last=False)

    def commit(self, keys: Sequence[str]) -> None:
        self._end(keys, "committed", None)

    def fail(self, keys: Sequence[str], cause: str) -> None:
        """cause : one sentence, without any text of a prompt or an answer."""
        self._end(keys, "failed", cause)

    def _end(self, keys: Sequence[str], state: Literal["committed", "failed"], cause: str | None) -> None:
        with self._lock:
            for key in keys:
                found = self._states.get(key)
                if found is not None and found.state == "pending":
                    self._states[key] = replace(found, state=state, cause=cause)
                    self._counts["pending"] -= 1
                    self._counts[state] += 1

    def get(self, key: str) -> State | None:
        with self._lock:
            return self._states.get(key)

    def failures(self) -> dict[str, str]:
        """key -> cause of what has failed."""
        with self._lock:
            return {key: state.cause or "" for key, state in self._states.items() if state.state == "failed"}

    def of_request(self, name: str) -> list[Asked]:
        """What was asked under this id, in the order of arrival."""
        with self._lock:
            return list(self._asked.get(name, ()))

    def counts(self) -> dict[str, int]:
        """{"pending": .., "committed": .., "failed": ..} since the start."""
        with self._lock:
            return {state: self._counts[state] for state in ("pending", "committed", "failed")}
