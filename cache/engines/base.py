"""What every engine offers: prompts in, answers out, rows into a shard when the driver knows where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hiddenlake.cache import positions
from hiddenlake.cache.model import Model
from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.samples import Generation, Prompt
from hiddenlake.cache.worker.plan import Placement


@dataclass(frozen=True, slots=True)
class Request:
    """What a capture asks of an engine.

    max_length : longest sequence there will be, prompt + answer, in tokens.
    ring_bytes : host memory in which rows may wait until their positions are known.
    options : the engine's own settings, e.g. vLLM's engine arguments.
    """

    model: Model
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    max_new_tokens: int
    max_length: int
    ring_bytes: int
    options: dict[str, Any]

    @property
    def table(self) -> TapTable:
        return TapTable(self.sites, self.layers, self.model.n_layers)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row of every tap."""
        return len(self.table) * self.model.hidden * (2 if self.model.dtype == "bfloat16" else 4)

    @property
    def prompt_rows(self) -> int:
        """Most prompt tokens of one sample that must wait in the ring."""
        return len(positions.prompt_rows(self.positions, self.max_length))

    @property
    def rows_per_sample(self) -> int:
        """Most tokens of one sample that must wait in the ring."""
        offsets = positions.answer_rows(self.positions)
        return self.prompt_rows + (self.max_new_tokens if offsets is None else len(offsets))


class Engine(Protocol):
    """An engine with its taps in place.

    provenance : engine, versions and device, stored with every commit; not part of the value identity.
    """

    provenance: dict[str, Any]

    def has_room(self) -> bool:
        """Whether another prompt may be submitted: rows in flight are bounded by ring_bytes."""

    def submit(self, prompt: Prompt) -> None: ...

    def step(self) -> list[Generation]:
        """Work on what was submitted; returns what has finished since the last call, perhaps nothing."""

    def store(self, handle: dict[str, Any], placements: Sequence[Placement]) -> list[str | None]:
        """Copy finished samples' rows into a shard, and forget them: their memory is free again.

        Returns None, or why a sample cannot be stored, for each.
        """

    def close(self) -> None: ...
