"""Plan and Placement: what the driver tells the worker. Plain JSON on the wire; no tensor crosses."""

from dataclasses import asdict, dataclass
from typing import Any

from hiddenlake.cache.positions import Tokens

# Fields of SamplingParams.extra_args. A request without the first is not captured: its key, or a list of keys where one
# request has several answers.
KEY_ARG = "hiddenlake"
# The request's own positions, by name, instead of the plan's.
POSITIONS_ARG = "hiddenlake_positions"
# Whether the last token must be fed once more, so that it has an activation.
LAST_TOKEN_ARG = "hiddenlake_last_token"
# Given text is fed as one prompt: how much of it is the sample's own prompt.
PROMPT_LENGTH_ARG = "hiddenlake_prompt_length"
# Positions that are known before the text is fed: token indices, instead of what the plan's positions may mean.
TOKENS_ARG = "hiddenlake_tokens"
# A request that only feeds a finished sample's last token: its prompt is that sample's whole sequence.
TAIL_ARG = "hiddenlake_tail"

# The key of the start-up check: its last prompt token and its whole answer are kept, whatever the plan.
CANARY = "canary"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to capture, fixed before the model is compiled.

    positions, tokens : named positions, and token-level coverage or None.
    widths : kind of width -> elements, as Model.widths.
    dtype : `bfloat16`, `float16` or `float32`, what is stored.
    ring_rows : rows of the ring; one holds one token of every tap.
    max_rows : most rows that one step can want; None for every token that it computes.
    spill : folder for rows that the ring has no place for, or None: such samples fail.
    shared : whether the engine also answers requests that are no capture's, which must not notice it.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    positions: tuple[str, ...]
    tokens: Tokens | None
    widths: dict[str, int]
    dtype: str
    ring_rows: int
    max_rows: int | None
    spill: str | None = None
    shared: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": None if self.tokens is None else str(self.tokens)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        tokens = value["tokens"]
        return cls(
            **{
                **value,
                "sites": tuple(value["sites"]),
                "layers": tuple(value["layers"]),
                "positions": tuple(value["positions"]),
                "tokens": None if tokens is None else Tokens.parse(tokens),
            }
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a sample and where they go in a token shard.

    handle : which of the handles sent along.  row : of the first token in the shard.
    tokens : (start, stop, step) of the token indices.
    """

    handle: int
    row: int
    tokens: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a finished sample's rows go.

    token_ids : prompt + answer, as the engine returned them.
    layers : of the coverage, which may be some of those that are tapped; as its sites are the shard's.
    token_index : (position,) index into token_ids, -1 where absent, -2 where pooled.
    pools : (position, function, start, stop) of each pooled position that is present.
    handle : which of the handles sent along.  slot : the sample's place in that shard.
    pieces : of token-level data.
    done : whether this is all of it, so that the rows are free again.
    """

    key: str
    token_ids: tuple[int, ...]
    prompt_length: int
    layers: tuple[int, ...]
    token_index: tuple[int, ...]
    pools: tuple[tuple[int, str, int, int], ...]
    handle: int | None
    slot: int
    pieces: tuple[Piece, ...] = ()
    done: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        return cls(**value | {"pieces": tuple(Piece(**piece) for piece in value["pieces"])})
