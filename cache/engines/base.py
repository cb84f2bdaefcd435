"""What every engine offers: prompts in, answers out, rows into a shard when the driver knows where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import Decoding
from hiddenlake.cache.inquiry import Ask, Reply
from hiddenlake.cache.model import Model
from hiddenlake.cache.pools import Pool
from hiddenlake.cache.positions import Tokens, wanted
from hiddenlake.cache.rows import TapTable, tap_table
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.worker.plan import Placement


@dataclass(frozen=True, slots=True)
class Request:
    """What a capture asks of an engine.

    positions, tokens : named positions, and token-level coverage or None.
    max_length : longest sequence there will be, prompt + answer, in tokens.
    ring_bytes : host memory in which rows may wait until their positions are known.
    lora : folder of an adapter, or None.
    options : the engine's own settings, e.g. vLLM's engine arguments.
    ask_length : longest question about an answer that the engine may be asked, reply included, in tokens; 0 for none.
    varying : whether the engine shall go on to other requests (see Engine.serve): positions, decoding, and some of the sites
        and layers. Then max_length and the decoding's longest answer bound theirs; rows are admitted as each sample needs
        them, and what the ring has no room for is spilled.
    spill : folder for that, where the request is varying.
    """

    model: Model
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    tokens: Tokens | None
    decoding: Decoding
    max_length: int
    ring_bytes: int
    lora: str | None
    options: dict[str, Any]
    ask_length: int = 0
    varying: bool = False
    spill: str | None = None

    @property
    def table(self) -> TapTable:
        """The taps of a process that has the whole model."""
        return tap_table(self.sites, self.layers, self.model.widths, self.model.n_layers)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row of every tap."""
        return len(self.table) * self.model.itemsize

    def rows(self, prompt_length: int, answer_length: int | None = None) -> int:
        """Most tokens of one sample that must wait in the ring. answer_length : of a given answer."""
        want = wanted(self.positions, self.tokens, prompt_length)
        longest = self.decoding.max_new_tokens if answer_length is None else answer_length
        return len(want.prompt) + want.answer_rows(longest)

    @property
    def rows_per_sample(self) -> int:
        """Most tokens of any sample that must wait in the ring."""
        answer = self.decoding.max_new_tokens or None
        return self.rows(self.max_length, None if answer else self.max_length)

    @property
    def sample_bytes(self) -> int:
        """Most bytes that one sample takes while it waits."""
        pools = wanted(self.positions, self.tokens, self.max_length).pools
        return self.rows_per_sample * self.row_bytes + Pool.bytes(pools, len(self.table))

    def check_serves(self, other: "Request") -> None:
        """Raise BadInputError where an engine that was started for this request would give other values for another."""
        mine, others = self._values(), other._values()
        if differing := [f"{name} {mine[name]}, not {others[name]}" for name in mine if mine[name] != others[name]]:
            raise BadInputError(
                f"the engine was started for another request ({'; '.join(differing)}): start one for this job's request"
            )
        for what, ours, theirs in (
            ("sequences", self.max_length, other.max_length),
            ("questions about answers", self.ask_length, other.ask_length),
        ):
            if theirs > ours:
                raise BadInputError(
                    f"the engine was started for {what} of up to {ours} tokens, this job needs {theirs}: start one for "
                    f"this job's request"
                )

    def check_may_follow(self, other: "Request") -> None:
        """Raise BadInputError where an engine that was started for this varying request cannot go on to another."""
        mine, others = self._values(), other._values()
        fixed = [name for name in ("weights", "dtype", "lora") if mine[name] != others[name]]
        fixed += [name for name in ("sites", "layers") if not set(others[name]) <= set(mine[name])]
        if fixed or other.max_length > self.max_length:
            raise BadInputError(
                f"the engine was started for {', '.join(f'{name} {mine[name]}' for name in fixed) or 'sequences'} of up to "
                f"{self.max_length} tokens, this request has {', '.join(f'{name} {others[name]}' for name in fixed)} "
                f"{other.max_length} tokens: start one for it"
            )

    def _values(self) -> dict[str, Any]:
        return {
            "weights": self.model.weights,
            "dtype": self.model.dtype,
            "sites": self.sites,
            "layers": self.layers,
            "positions": self.positions,
            "tokens": self.tokens,
            "decoding": self.decoding,
            "lora": self.lora,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """What rows take while they wait, in bytes, known before the model is loaded.

    samples : in flight at once, at most.  sample_bytes : on the host, for each of them at most.
    step_bytes : on the host, of one step's rows that only pass through a pooling.
    device_bytes : of the taps' buffers, on the GPU that has most of them.
    kv_tokens : what the KV cache of that GPU holds less for them, in tokens.
    """

    samples: int
    sample_bytes: int
    step_bytes: int = 0
    device_bytes: int = 0
    kv_tokens: int = 0

    def host_bytes(self, samples: int) -> int:
        """Of a run of so many samples."""
        return min(samples, self.samples) * self.sample_bytes + self.step_bytes


class Engine(Protocol):
    """An engine, whose model is loaded when it is started.

    request : what it was made for.
    memory : what it will take.
    provenance : engine, versions and device, stored with every commit; not part of the value identity.
    """

    request: Request
    memory: Memory
    provenance: dict[str, Any]

    def start(self, canary: Sequence[int]) -> None:
        """Load the model with its taps. vLLM must answer a prompt, whose ids these are, before it may capture.

        Raises CaptureError; nothing is running then.
        """

    def serve(self, request: Request) -> None:
        """Go on with another request, while nothing is in flight, where the first was varying. Raises BadInputError."""

    def has_room(self, prompt: Prompt) -> bool:
        """Whether a prompt may be submitted now: rows in flight are bounded by ring_bytes."""

    @property
    def ring_used(self) -> float:
        """Share of the memory for waiting rows that is reserved."""

    def submit(self, prompt: Prompt, tokens: Sequence[int] | None = None) -> None:
        """Start to generate, or to feed what is given.

        tokens : indices of the tokens that will be stored, ascending, where they are known already.
        """

    def ask(self, key: str, token_ids: Sequence[int], ask: Ask, seed: int | None) -> None:
        """Start to generate a reply about a sample, of which nothing is captured. One at a time a sample.

        token_ids : of the question, as the model shall see it.  seed : None for greedy decoding.
        """

    def replies(self) -> list[tuple[str, Reply]]:
        """(key, reply) of what `step` has finished since the last call."""

    def step(self) -> list[Generation]:
        """Work on what was submitted and asked; returns what was captured since the last call, perhaps nothing."""

    def store(self, handles: Sequence[dict[str, Any]], placements: Sequence[Placement]) -> list[tuple[str, str | None]]:
        """Start to copy finished samples' rows into shards. Returns what has been stored meanwhile, as `stored`.

        handles : of the shards that the placements name by number.
        """

    def stored(self, wait: bool) -> list[tuple[str, str | None]]:
        """(key, None or why it cannot be stored) of each placement that was finished since the last call.

        wait : for all that were given. A sample is forgotten with its last placement: its memory is free again.
        """

    def close(self) -> None:
        """End it, started or not."""
