"""Job: everything about a capture that is decided before an engine starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hiddenlake.cache import positions as rules
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.identity import Decoding, Identity, sample_key
from hiddenlake.cache.model import load_model
from hiddenlake.cache.samples import Prompt, Task
from hiddenlake.cache.sites import parse_layers, parse_sites
from hiddenlake.cache.store.layout import Coverage

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """One task to be captured from one model.

    prompts : in task order, those that fit the model's context.
    too_long : those that do not.
    """

    task: Task
    identity: Identity
    coverage: Coverage
    request: Request
    prompts: tuple[Prompt, ...]
    too_long: tuple[Prompt, ...]


def plan_job(
    model: str | os.PathLike[str],
    task: Task,
    *,
    sites: Sequence[str] = ("mlp_out",),
    layers: str | Sequence[int] = "all",
    positions: str | Sequence[str | int] = "paper",
    dtype: str | None = None,
    max_new_tokens: int = 100,
    ring_bytes: int = 2 * GIB,
    options: dict[str, Any] | None = None,
) -> Job:
    """Parse what was asked for, read the model's config and tokenizer, and make the prompts with their keys.

    The arguments are those of `hiddenlake.cache.capture.capture`. Raises BadInputError, UnknownNameError.
    """
    known, named_layers = parse_sites(sites)
    position_names = rules.parse_positions(positions)
    decoding = Decoding(max_new_tokens)
    source = load_model(model, dtype)
    layer_numbers = parse_layers(named_layers if named_layers is not None else layers, source.n_layers)
    identity = Identity(
        model=source.name,
        weights=source.weights,
        quantization=source.quantization,
        lora=None,
        compute_dtype=source.dtype,
        stored_dtype=source.dtype,
        chat_template=source.chat_template,
        task=task.name,
        judge=task.rules,
        decoding=decoding,
    )
    prompts = []
    for question in task.questions:
        text, ids = source.encode(question.question)
        prompts.append(Prompt(sample_key(identity, ids, question.index, 0), question, 0, text, ids))
    # one position must be left for the first answer token
    fitting = tuple(p for p in prompts if len(p.token_ids) < source.context)
    longest = max((len(p.token_ids) for p in fitting), default=1)
    return Job(
        task=task,
        identity=identity,
        coverage=Coverage(known, layer_numbers, position_names, dict.fromkeys((*known, "embed"), source.hidden), source.dtype),
        request=Request(
            model=source,
            sites=known,
            layers=layer_numbers,
            positions=position_names,
            max_new_tokens=max_new_tokens,
            max_length=min(source.context, longest + max_new_tokens),
            ring_bytes=ring_bytes,
            options=dict(options or {}),
        ),
        prompts=fitting,
        too_long=tuple(p for p in prompts if len(p.token_ids) >= source.context),
    )
