"""Taps: the engine arguments that put them into a vLLM that others start and drive."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hiddenlake.cache.engines.vllm_setup import TAP_ARGUMENTS
from hiddenlake.cache.errors import CaptureError
from hiddenlake.cache.model import DTYPES, Model, load_model
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
    model: str,
    *,
    sites: Sequence[str],
    layers: str | Sequence[int],
    dtype: str | None,
    ring_bytes: int,
    spill: str | Path,
) -> Taps:
    """Read the model's config, and plan taps in it.

    sites, layers, dtype : as `hiddenlake.capture` takes them.
    ring_bytes : host memory in which rows wait for their answers.  spill : folder for a scratch file behind it.

    Raises BadInputError, UnknownNameError.
    """
    source = load_model(model, dtype)
    known, named_layers = parse_sites(sites, source.family)
    numbers = parse_layers(named_layers if named_layers is not None else layers, source.n_layers)
    plan = Plan(
        sites=known,
        layers=numbers,
        n_layers=source.n_layers,
        positions=(),
        tokens=None,
        widths=source.widths,
        dtype=source.dtype,
        ring_rows=0,
        max_rows=None,
        spill=str(spill),
        shared=True,
    )
    row_bytes = _row_bytes(plan)
    return Taps(source, replace(plan, ring_rows=ring_bytes // row_bytes), row_bytes)


def find_taps(config: Any) -> Taps | None:
    """The taps that an engine with this VllmConfig was built with, or None."""
    plan = (config.additional_config or {}).get(CONFIG_KEY)
    if plan is None:
        return None
    plan = Plan.from_json(plan)
    return Taps(load_model(config.model_config.model, plan.dtype), plan, _row_bytes(plan))


def _row_bytes(plan: Plan) -> int:
    elements = len(tap_table(plan.sites, plan.layers, plan.widths, plan.n_layers))
    return elements * DTYPES[plan.dtype]


def served_model(model: Model, config: Any) -> Model:
    """The model as an engine with this VllmConfig runs it. Raises CaptureError where that is another than it says."""
    its = config.model_config
    changed = [name for name in ("revision", "hf_overrides") if getattr(its, name)]
    changed += ["tokenizer"] if its.tokenizer != its.model else []
    changed += ["quantization"] if (its.quantization is None) != (model.quantization is None) else []
    if changed:
        raise CaptureError(
            f"vLLM's {', '.join(changed)} would make the stored activations those of another model than the value "
            f"identity says: leave it out, and pass the folder of the model that is meant"
        )
    return replace(model, context=its.max_model_len)


def check_ring(config: Any, ring_rows: int, row_bytes: int) -> None:
    """Raise CaptureError unless a ring holds what one step of an engine with this VllmConfig may compute."""
    step = config.scheduler_config.max_num_batched_tokens
    if ring_rows < step:
        raise CaptureError(
            f"the ring holds {ring_rows} rows of {row_bytes} bytes, but one step may compute {step}: allow it "
            f"{step * row_bytes} bytes, lower vLLM's max_num_batched_tokens, or tap fewer sites or layers"
        )
