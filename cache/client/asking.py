"""Asking: what is sent to a service, and what its answers mean. Pure: whoever drives these steps does the sending.

A step is a generator: it yields an Ask, and is sent an Answer or a Failure; it yields a Pause, and is sent nothing. The
same steps are driven by a blocking connection and by an asynchronous one.
"""

import email.utils
import json
import random
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.service import wire

# A server that is started again, or a key that has too many requests on their way, is waited for, but not for ever.
ATTEMPTS = 6
FIRST_SECONDS, MOST_SECONDS = 0.2, 5.0
# No attempt begins later than this after the first: one that hangs takes its time too.
PATIENCE_SECONDS = 120.0
# The longest that a server may have us wait before we ask again.
MOST_ASKED_SECONDS = 60.0

_AGAIN = frozenset({429, 502, 503, 504})

# Of an answer that is no activations and no table.
_MOST_TEXT = 64 << 20


class Broken(Exception):
    """An answer that ended early, or is not what HTTP says it is: worth another try."""


class Collect:
    """Takes an answer's body whole. most : bytes."""

    def __init__(self, most: int | None = _MOST_TEXT) -> None:
        self._most, self._body, self._length = most, bytearray(), None

    def begin(self, headers: Mapping[str, str]) -> None:
        self._body.clear()
        self._length = headers.get("content-length")

    def write(self, part: bytes) -> None:
        self._body += part
        if self._most is not None and len(self._body) > self._most:
            raise StoreError(f"an answer has more than {self._most} bytes: that is no hiddenlake service")

    def finish(self) -> bytes:
        if self._length is not None and int(self._length) != len(self._body):
            raise Broken(f"{len(self._body)} bytes of {self._length}")
        return bytes(self._body)


class Fill:
    """Takes an answer's body into memory that is there already. Never too little, never too much.

    memory : (bytes,) uint8, C-contiguous.  expected : headers that the answer must have.
    """

    def __init__(self, memory: memoryview, expected: Mapping[str, str]) -> None:
        self._memory, self._expected, self._at = memory, expected, 0

    def begin(self, headers: Mapping[str, str]) -> None:
        self._at = 0
        expected = dict(self._expected)
        if "Content-Length" in headers:  # else they are counted as they come
            expected["Content-Length"] = str(len(self._memory))
        for name, value in expected.items():
            if headers.get(name) != value:
                raise StoreError(
                    f"an answer has {name} {headers.get(name)!r}, expected {value!r}: it is not what was asked for; the "
                    f"capture may have been made again or compacted: refresh() it"
                )

    def write(self, part: bytes) -> None:
        stop = self._at + len(part)
        if stop > len(self._memory):
            raise Broken(f"more than {len(self._memory)} bytes")
        self._memory[self._at : stop] = part
        self._at = stop

    def finish(self) -> None:
        if self._at != len(self._memory):
            raise Broken(f"{self._at} bytes of {len(self._memory)}")


Sink = Collect | Fill


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, safe to be sent again.

    path : below the service's address.  body : sent as JSON.  sink : takes the body of a good answer.
    good : statuses of one.
    """

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    sink: Sink = field(default_factory=Collect)
    good: tuple[int, ...] = (200,)


@dataclass(frozen=True, slots=True)
class Answer:
    """status, headers : of HTTP.  value : what the sink made of a good answer, the body of another."""

    status: int
    headers: Mapping[str, str]
    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """No whole answer came. cause : what went wrong."""

    cause: Exception


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


class Refused(Exception):
    """The service's answer is a problem. kind : its type.  error : what it is as an exception of ours."""

    def __init__(self, kind: str, error: HiddenlakeError) -> None:
        super().__init__(str(error))
        self.kind, self.error = kind, error


Steps = Generator[Ask | Pause, Any, Any]


def ask(request: Ask) -> Steps:
    """Ask, again where the server cannot answer now. Returns what the sink made. Raises Refused, StoreError."""
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        found: Answer | Failure = yield request
        if isinstance(found, Answer) and found.status in request.good:
            return found.value
        wait = _wait(found, attempt)
        if wait is None or time.monotonic() - start + wait > PATIENCE_SECONDS:
            break
        yield Pause(wait)
    if isinstance(found, Failure):
        raise StoreError(
            f"no whole answer after {attempt} attempts ({found.cause or type(found.cause).__name__}): see whether the "
            f"service runs (`hiddenlake serve`) and its address is right"
        ) from found.cause
    raise _refused(found)


def ask_plainly(request: Ask) -> Steps:
    """The same, with a problem raised as an exception of ours."""
    try:
        return (yield from ask(request))
    except Refused as refused:
        raise refused.error from None


def _wait(found: Answer | Failure, attempt: int) -> float | None:
    """Seconds until the next attempt; None for no other."""
    if attempt == ATTEMPTS or (isinstance(found, Answer) and found.status not in _AGAIN):
        return None
    # Clients that were turned away together do not come back together.
    wait = min(MOST_SECONDS, FIRST_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
    asked = _retry_after(found.headers) if isinstance(found, Answer) else None
    if asked is None:
        return wait
    return None if asked > MOST_ASKED_SECONDS else asked + wait


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal() and value.isascii():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _refused(answer: Answer) -> Refused:
    try:
        body = json.loads(answer.value)
        kind, message, remedy, request = (str(body[name]) for name in ("type", "message", "remedy", "request_id"))
    except (ValueError, TypeError, KeyError):
        what = f"answered {answer.status} with no word of hiddenlake's"
        return Refused("", StoreError(f"the service {what}: see whether the address is that of `hiddenlake serve`"))
    there = f"; there is {json.dumps(body['there'])[:500]}" if isinstance(body.get("there"), dict) else ""
    if kind == "no_key":
        remedy = "give connect(..., key=...), or HIDDENLAKE_KEY, one that `hiddenlake keys add LAKE NAME` made"
    error = wire.ERRORS.get(kind, StoreError)
    return Refused(kind, error(f"{message}: {remedy}{there} (request {request})"))
