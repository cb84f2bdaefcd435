"""Taps: the engine arguments that put them into a vLLM that others start and drive."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.engines.vllm_setup import TAP_ARGUMENTS
from hiddenlake.cache.model import Model, load_model
from hiddenlake.cache.rows import tap_table
from hiddenlake.cache.sites import parse_layers, parse_sites
from hiddenlake.cache.worker.plan import Plan
from hiddenlake.cache.worker.plugin import CONFIG_KEY


@dataclass(frozen=True, slots=True)
class Taps:
    """What is tapped in a model. row_bytes : of one token's row of every tap."""

    model: Model
    plan: Plan
    row_bytes: int

    def arguments(self, additional_config: dict[str, Any] | None = None) -> dict[str, Any]:
        """vLLM's engine arguments, beside the model and its dtype."""
        return TAP_ARGUMENTS | {"additional_config": {**(additional_config or {}), CONFIG_KEY: self.plan.to_json()}}


def make_taps(
    model: str, *, sites: Sequence[str], layers: str | Sequence[int], dtype: str | None, ring_bytes: int, spill: str | Path
) -> Taps:
    """Read the model's config, and plan taps in it.

    sites, layers, dtype : as `hiddenlake.capture` takes them.
    ring_bytes : host memory in which rows wait for their answers.  spill : folder for a scratch file behind it.

    Raises BadInputError, UnknownNameError.
    """
    source = load_model(model, dtype)
    known, named_layers = parse_sites(sites, source.family)
    numbers = parse_layers(named_layers if named_layers is not None else layers, source.n_layers)
    elements = len(tap_table(known, numbers, source.widths, source.n_layers))
    row_bytes = elements * (2 if source.dtype == "bfloat16" else 4)
    plan = Plan(
        sites=known,
        layers=numbers,
        n_layers=source.n_layers,
        positions=(),
        tokens=None,
        widths=source.widths,
        dtype=source.dtype,
        ring_rows=ring_bytes // row_bytes,
        max_rows=None,
        spill=str(spill),
    )
    return Taps(source, plan, row_bytes)
