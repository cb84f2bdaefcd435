"""Job: everything about a capture that is decided before an engine starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache import positions as rules
from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import GREEDY, Decoding, Identity, Sampling, sample_key
from hiddenlake.cache.inquiry import FollowUp
from hiddenlake.cache.model import Model, hash_weights, load_model
from hiddenlake.cache.samples import Prompt, Question, Task
from hiddenlake.cache.sites import SITES, parse_layers, parse_sites
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.shard_file import CODECS

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """One task to be captured from one model.

    prompts : in task order, those that fit the model's context.
    too_long : those that do not.
    follow_up : the task's, or None.
    codec : of a new capture; None for none.
    """

    task: Task
    identity: Identity
    coverage: Coverage
    request: Request
    prompts: tuple[Prompt, ...]
    too_long: tuple[Prompt, ...]
    follow_up: FollowUp | None = None
    codec: str | None = None


def plan_job(
    model: str | os.PathLike[str],
    task: Task,
    *,
    sites: Sequence[str] = ("mlp_out",),
    layers: str | Sequence[int] = "all",
    positions: str | Sequence[str | int] = "paper",
    dtype: str | None = None,
    max_new_tokens: int = 100,
    sampling: Sampling = GREEDY,
    samples: int = 1,
    lora: str | os.PathLike[str] | None = None,
    ring_bytes: int = 2 * GIB,
    options: dict[str, Any] | None = None,
    codec: str | None = None,
) -> Job:
    """Parse what was asked for, read the model's config and tokenizer, and make the prompts with their keys.

    The arguments are those of `hiddenlake.cache.capture.capture`. Raises BadInputError, UnknownNameError.
    """
    names, tokens = rules.parse_positions(positions)
    if samples < 1 or (samples > 1 and sampling.greedy):
        raise BadInputError(
            f"{samples} samples a prompt at temperature {sampling.temperature}: expected at least 1, and a temperature "
            f"above 0 for more than one, since greedy answers to one prompt are all the same"
        )
    if codec is not None and codec not in CODECS:
        raise BadInputError(f"codec {codec!r} does not exist: expected one of {', '.join(CODECS)}")
    given = _given(task, samples)
    follow_up: FollowUp | None = getattr(task, "follow_up", None)
    if given and follow_up is not None:
        raise BadInputError(
            f"task {task.name}: a model is to be asked about answers that are given: mark them before they are fed, and leave "
            f"out `follow_up`"
        )
    if max_new_tokens < 1:
        raise BadInputError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    source = load_model(model, dtype)
    known, named_layers = parse_sites(sites, source.family)
    layer_numbers = parse_layers(named_layers if named_layers is not None else layers, source.n_layers)
    identity = Identity(
        model=source.name,
        weights=source.weights,
        quantization=source.quantization,
        lora=None if lora is None else hash_weights(Path(lora), "adapter_config.json"),
        compute_dtype=source.dtype,
        # codes and a scale are other numbers; compressed ones are the same
        stored_dtype="float8_e4m3fn" if codec == "fp8" else source.dtype,
        chat_template=source.chat_template,
        task=task.name,
        judge=task.rules,
        decoding=Decoding(0) if given else Decoding(max_new_tokens, sampling),
    )
    prompts = [prompt for question in task.questions for prompt in _prompts(source, identity, question, samples)]
    # one position must be left for the first answer token
    fitting = tuple(p for p in prompts if _length(p) + (p.given is None) <= source.context)
    longest = max(map(_length, fitting), default=1)
    return Job(
        task=task,
        identity=identity,
        coverage=Coverage(
            known,
            layer_numbers,
            names,
            {site: source.widths[SITES[site].width] for site in (*known, "embed")},
            source.dtype,
            tokens,
        ),
        request=Request(
            model=source,
            sites=known,
            layers=layer_numbers,
            positions=names,
            tokens=tokens,
            decoding=identity.decoding,
            max_length=longest if given else min(source.context, longest + max_new_tokens),
            ring_bytes=ring_bytes,
            lora=None if lora is None else str(lora),
            options=dict(options or {}),
            ask_length=0 if follow_up is None or follow_up.served else min(source.context, follow_up.longest),
        ),
        prompts=fitting,
        too_long=tuple(p for p in prompts if _length(p) + (p.given is None) > source.context),
        follow_up=follow_up,
        codec=codec,
    )


def _given(task: Task, samples: int) -> bool:
    """Whether a task's answers are given, which is so for all of them or for none."""
    count = sum(question.given is not None for question in task.questions)
    if count not in (0, len(task.questions)):
        raise BadInputError(
            f"task {task.name}: {count} of {len(task.questions)} answers are given: expected all or none; make two tasks"
        )
    if count and samples > 1:
        raise BadInputError(f"{samples} samples of given text: it is fed as it is, so expected 1")
    return bool(count)


def _prompts(model: Model, identity: Identity, question: Question, samples: int) -> list[Prompt]:
    """One a sample; their ids are made, and held, once."""
    if question.given == "":  # a plain text: no turn of a chat
        text = question.question
        ids = tuple(model.tokenizer(text)["input_ids"])
        if not ids:
            raise BadInputError(f"row {question.index}: the text is empty: expected at least one token")
    else:
        text, ids = model.encode(question.question)
    given = None
    keyed = ids
    if question.given is not None:
        given = tuple(model.tokenizer(question.given, add_special_tokens=False)["input_ids"]) if question.given else ()
        # a bar that is no token id: the same text split elsewhere is another sample
        keyed = (*ids, -1, *given)
    return [
        Prompt(sample_key(identity, keyed, question.index, k), question, k, text, ids, given) for k in range(samples)
    ]


def _length(prompt: Prompt) -> int:
    """Tokens that are known before anything is generated."""
    return len(prompt.token_ids) + len(prompt.given or ())
