"""Plan and Placement: what the driver tells the worker. Plain JSON on the wire; no tensor crosses."""

from dataclasses import asdict, dataclass
from typing import Any

# Fields of SamplingParams.extra_args: a sample's key, without which a request is not captured, and whether its
# last token must be fed.
KEY_ARG = "hiddenlake"
LAST_TOKEN_ARG = "hiddenlake_last_token"

# The key of the start-up check: its last prompt token and its whole answer are kept, whatever the plan.
CANARY = "canary"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to capture, fixed before the model is compiled.

    dtype : `bfloat16` or `float32`, what is stored.
    ring_rows : slots of the host arena; one slot holds one token of every tap.
    max_rows : most rows that one step can want.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    positions: tuple[str, ...]
    dtype: str
    ring_rows: int
    max_rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        return cls(
            **{
                **value,
                "sites": tuple(value["sites"]),
                "layers": tuple(value["layers"]),
                "positions": tuple(value["positions"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a finished sample's rows go.

    token_ids : prompt + answer, as the engine returned them.
    token_index : (position,) index into token_ids, -1 where absent.
    slot : the sample's place in the shard.
    """

    key: str
    token_ids: tuple[int, ...]
    token_index: tuple[int, ...]
    slot: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
