"""Read requests: which activations a client asks for, and what of them is not there, or is too much."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hiddenlake.cache.service import wire
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import EMBED
from hiddenlake.cache.store.moment import Moment

# What stands in front of the values is made at once: token indices and names, of millions of rows at most.
_HEAD_BYTES = 64 << 20
_KEY_BYTES = 72

# Neither `true` nor 13.0: nothing that is meant otherwise becomes a number.
_Number = Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]


class ReadRequest(BaseModel):
    """Which activations, and how they are sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    capture: str = Field(description="The capture's name.", max_length=128, examples=["cities"])
    site: str = Field(description="A site of the capture, or `embed`.", max_length=64, examples=["mlp_out"])
    layers: tuple[_Number, ...] | None = Field(
        None, description="0-based block indices; all by default.", max_length=4096
    )
    positions: tuple[str | _Number, ...] | None = Field(
        None, description="Named or numbered positions; all by default.", max_length=4096, examples=[["last_q", -1]]
    )
    tokens: Literal["all"] | tuple[_Number, ...] | tuple[tuple[_Number, ...], ...] | None = Field(
        None,
        description="Instead of positions: indices into each sample's prompt and answer, negative ones from the end; a list "
        "of such lists, one for each sample; or `all` that are stored token by token.",
        max_length=wire.MOST_NAMES,
    )
    samples: tuple[str | _Number, ...] | None = Field(
        None, description="Keys, or rows in task order; all by default.", max_length=1_000_000
    )
    snapshot: str | None = Field(
        None,
        description="Of the moment by which rows are numbered, and of which all samples are meant: 409 at any other.",
        max_length=64,
    )
    dtype: Literal["stored", "float32"] = Field("stored", description="As stored, or widened exactly.")
    format: Literal["safetensors", "raw"] = Field(
        "safetensors", description="safetensors, or the values alone with dtype and shape in headers."
    )
    check: bool = Field(True, description="False skips the checksums, for measurements only.")


def missing(request: ReadRequest, snapshot: Moment) -> str | None:
    """What is asked for by a name that is not there; without the name, which might be a text that went astray."""
    c = snapshot.coverage
    if request.site not in c.widths:
        return "`site` is none of this capture"
    if request.layers and not SITES[request.site].layered:
        return "`site` has no layers, but `layers` are asked for"
    count, known = len(snapshot.keys), set(c.positions)
    there: dict[str, Callable[[Any], bool]] = {
        "layers": lambda layer: layer in c.layers,
        "positions": lambda position: str(position) in known,
        "samples": lambda key: key in snapshot.row_of if isinstance(key, str) else 0 <= key < count,
    }
    for name, is_there in there.items():
        wanted = getattr(request, name) or ()
        number = next((i for i, one in enumerate(wanted) if not is_there(one)), None)
        if number is not None:
            return f"`{name}`: number {number} of the {len(wanted)} that are asked for (from 0) is not there"
    if request.tokens is None and not c.positions:
        return "this capture holds no positions, only tokens"
    if request.tokens == "all" and c.tokens is None:
        return "this capture holds no tokens, only positions"
    return None


def not_captured(snapshot: Moment, message: str, **there: Any) -> Problem:
    """there : what else helps, beside the coverage."""
    c = snapshot.coverage
    coverage = {
        "sites": [*c.sites, EMBED],
        "layers": list(c.layers),
        "positions": list(c.positions),
        "tokens": None if c.tokens is None else str(c.tokens),
        "samples": len(snapshot.keys),
    }
    return Problem(
        409, "not_captured", message, "ask for what is there, or capture it", there=coverage | there
    )  # fmt: skip


def check_size(shape: Sequence[int], item_bytes: int, beside: int, samples: int, most_bytes: int) -> None:
    """shape, item_bytes : of the values.  beside : bytes of what is sent beside them.  samples : whose keys are.

    Raises Problem (413).
    """
    values = math.prod(shape) * item_bytes
    if values > most_bytes:
        raise Problem(
            413, "too_large", f"the answer would have {values} bytes, the most is {most_bytes}",
            "ask for fewer layers, positions or samples at once",
        )  # fmt: skip
    if beside + _KEY_BYTES * samples > _HEAD_BYTES:
        raise Problem(
            413, "too_large", f"token indices and keys would take more than {_HEAD_BYTES} bytes",
            "ask for fewer positions, tokens or samples at once",
        )  # fmt: skip
