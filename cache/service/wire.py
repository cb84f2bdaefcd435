"""Wire: what the service and its client agree on, beside the routes. Needs neither FastAPI nor httpx."""

from hiddenlake.cache.errors import (
    BadInputError,
    CaptureError,
    CorruptError,
    HiddenlakeError,
    IdentityError,
    StoreError,
    UnknownNameError,
)

# What a problem's type is again for whoever asked; any other is a StoreError.
ERRORS: dict[str, type[HiddenlakeError]] = {
    "not_captured": UnknownNameError,
    "corrupt": CorruptError,
    "other_identity": IdentityError,
    "bad_input": BadInputError,
    "too_large": BadInputError,
    "too_long": BadInputError,
    "too_many_inputs": BadInputError,
    "too_many_tokens": BadInputError,
    "no_model": UnknownNameError,
    "which_model": UnknownNameError,
    "not_cached": UnknownNameError,
    "not_tapped": UnknownNameError,
    "failed": CaptureError,
    "refused": BadInputError,
    "store": StoreError,
    "capture": CaptureError,
}

# Of a read by rows of a moment that is over.
OTHER_SNAPSHOT = "other_snapshot"

# Tokens, or lists of them, of one request.
MOST_NAMES = 65536

# Raised when an older client could misread what it is sent.
VERSION = 1

# Headers of an answer with activations: what they are, and of which moment.
SHAPE = "X-Hiddenlake-Shape"
DTYPE = "X-Hiddenlake-Dtype"
SNAPSHOT = "X-Hiddenlake-Snapshot"
# Names the commits that hold the samples that were asked for by name: the same, the same bytes.
COMMITS = "X-Hiddenlake-Commits"

REQUEST_ID = "X-Request-Id"

# Of a table of samples: its schema's metadata, which say what the capture is, and two columns of ours.
METADATA = b"hiddenlake"
COMMIT = "commit"
STORED_TOKENS = "stored_tokens"
