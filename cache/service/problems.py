"""Problems: the one shape of every answer that is an error, and which of our exceptions become which."""

from typing import Any

from pydantic import BaseModel, Field

from hiddenlake.cache.errors import (
    BadInputError,
    CaptureError,
    CorruptError,
    HiddenlakeError,
    IdentityError,
    StoreError,
    UnknownNameError,
)


class ProblemBody(BaseModel):
    """What an error looks like, whatever it is."""

    type: str = Field(description="What kind of problem it is; names never change.", examples=["not_captured"])
    message: str = Field(description="What was found, and what was expected.")
    remedy: str = Field(description="What to do.")
    request_id: str = Field(description="Names the request in the server's log.")
    there: dict[str, Any] | None = Field(None, description="What there is instead, where that helps.")


class Problem(HiddenlakeError):
    """An answer that is an error.

    status : of HTTP.  kind : its type.  there : what there is instead.  headers : of the answer, e.g. Retry-After.
    Messages carry no text of a prompt or an answer, no key, and no path of the server.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        remedy: str,
        *,
        there: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.remedy = status, kind, message, remedy
        self.there, self.headers = there, headers or {}

    def body(self, request_id: str) -> dict[str, Any]:
        body = {"type": self.kind, "message": self.message, "remedy": self.remedy, "request_id": request_id}
        return body if self.there is None else body | {"there": self.there}


# Of what reading and parsing raise: the first that fits.
_KINDS = (
    (UnknownNameError, 409, "not_captured", "ask for what is there"),
    (
        CorruptError,
        500,
        "corrupt",
        "tell whoever runs this server: `hiddenlake verify` and `repair` say what is damaged",
    ),
    (IdentityError, 409, "other_identity", "ask for activations of the same value identity"),
    (BadInputError, 422, "bad_input", "change the request as the message says"),
    (StoreError, 503, "store", "try again; if it stays, tell whoever runs this server"),
    (CaptureError, 503, "capture", "try again; if it stays, tell whoever runs this server"),
    (HiddenlakeError, 422, "refused", "change the request as the message says"),
)


def problem_of(error: Exception, where: str = "") -> Problem:
    """where : the lake's path, which is nobody else's business."""
    if isinstance(error, Problem):
        return error
    if not isinstance(error, HiddenlakeError):
        # Its message may quote anything.
        return Problem(500, "internal", "something went wrong that should not have", "tell whoever runs this server")
    status, kind, remedy = next(row[1:] for row in _KINDS if isinstance(error, row[0]))
    message = str(error).replace(f"{where}/", "").replace(where, "the lake") if where else str(error)
    return Problem(status, kind, message, remedy)


def no_such(what: str, remedy: str) -> Problem:
    """404, also for what is there and is not the caller's."""
    return Problem(404, "not_found", f"there is no such {what}", remedy)
