"""Intake: what one request asks to be captured, checked against what the engine taps and may spend."""

import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.identity import Decoding, Identity, sample_key
from hiddenlake.cache.model import Model
from hiddenlake.cache.positions import EXACT_ANSWER, POOLS, parse_positions, wanted
from hiddenlake.cache.sites import SITES, parse_layers, parse_sites
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.coverage import EMBED, Coverage
from hiddenlake.cache.store.root import is_capture, read_root
from hiddenlake.cache.store.sizes import choose_layout
from hiddenlake.cache.worker.plan import KEY_ARG, LAST_TOKEN_ARG, POSITIONS_ARG

# Fields of a request's extra arguments, `vllm_xargs` over HTTP: the capture's name, and what it shall hold.
CAPTURE, SITES_ARG, LAYERS_ARG = KEY_ARG, "hiddenlake_sites", "hiddenlake_layers"
ARGS = (CAPTURE, SITES_ARG, LAYERS_ARG, POSITIONS_ARG)

# Every name that the worker or a client may use. What is not in ARGS is never taken from a request.
PREFIX = "hiddenlake"

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Offer:
    """What may be captured from an engine, and where it goes.

    lake : the folder of the captures.
    model : with the engine's own longest sequence as its context.
    sites, layers : that are tapped.
    positions : of a capture whose first request names none.
    judged : whether exact answers are found in the answers.
    row_bytes : of one token's row of every tap.
    max_request_bytes : most host memory that the rows of one request may take, or None.
    buffer_bytes, shard_samples : of each capture, as open_writer's.
    rules : name and version of the judge, for the value identity.
    """

    lake: Path
    model: Model
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    row_bytes: int
    max_request_bytes: int | None
    buffer_bytes: int
    shard_samples: int
    rules: str | None = None

    @property
    def identity(self) -> Identity:
        model = self.model
        return Identity(
            model=model.name,
            weights=model.weights,
            quantization=model.quantization,
            lora=None,
            compute_dtype=model.dtype,
            stored_dtype=model.dtype,
            chat_template=None,  # clients render their prompts as they like; the ids are stored
            task="served",
            judge=self.rules or "none",
            decoding=Decoding(None),
        )


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that will be captured.

    number : how many requests came before it to this capture, since the start.
    keys : of its samples, in the order of its answers.
    last : whether the last token of an answer may be meant by some position.
    """

    capture: str
    coverage: Coverage
    number: int
    keys: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    last: bool

    def prepare(self, params: Any, feed_last: bool = True) -> Any:
        """vLLM's SamplingParams for this request: a copy of the caller's, with what the worker must know.

        feed_last : whether the engine's scheduler feeds last tokens where it is asked to.
        """
        tokens = () if self.coverage.tokens is None else (str(self.coverage.tokens),)
        prepared = copy(params)
        prepared.extra_args = {
            **{name: value for name, value in (params.extra_args or {}).items() if not name.startswith(PREFIX)},
            KEY_ARG: list(self.keys) if len(self.keys) > 1 else self.keys[0],
            POSITIONS_ARG: [*self.coverage.positions, *tokens],
            LAST_TOKEN_ARG: int(self.last and feed_last),
        }
        prepared.skip_reading_prefix_cache = True  # rows that are not computed cannot be captured
        if params.logprobs is None:
            prepared.logprobs = 0
        return prepared


class Intake:
    """Makes tickets. Not thread-safe: it belongs to the thread that requests come in on."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.identity = offer.identity
        self._known: dict[str, tuple[dict[str, Any], Coverage]] = {}
        self._numbers: Counter[str] = Counter()

    def asks(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether a request's extra arguments speak of a capture at all."""
        return bool(extra_args) and any(name.startswith(PREFIX) for name in extra_args)

    def ticket(
        self, extra_args: Mapping[str, Any], prompt_ids: Sequence[int], answers: int, max_tokens: int | None
    ) -> Ticket:
        """Check a request, before anything is generated.

        answers : how many it wants.  max_tokens : longest answer; None for as long as the context allows.

        Raises BadInputError, UnknownNameError, StoreError.
        """
        name, coverage = self.coverage(extra_args)
        q = len(prompt_ids)
        room = max(1, self.offer.model.context - q)
        want = wanted(coverage.positions, coverage.tokens, q)
        size = self.offer.row_bytes * answers * (len(want.prompt) + want.answer_rows(min(room, max_tokens or room)))
        if self.offer.max_request_bytes is not None and size > self.offer.max_request_bytes:
            raise BadInputError(
                f"up to {size} bytes would have to wait for this request, but one may take "
                f"{self.offer.max_request_bytes}: ask for fewer positions, tokens or answers"
            )
        request = uuid.uuid4().hex
        keys = tuple(sample_key(self.identity, prompt_ids, request, i) for i in range(answers))
        number = self._numbers[name]
        self._numbers[name] += 1
        return Ticket(name, coverage, number, keys, tuple(prompt_ids), want.last)

    def coverage(self, extra_args: Mapping[str, Any]) -> tuple[str, Coverage]:
        """The capture's name, and what it holds: that is also what its next requests must ask for.

        Raises BadInputError, UnknownNameError, StoreError.
        """
        name = self._name(extra_args)
        return name, self._coverage(name, extra_args)

    def _name(self, extra_args: Mapping[str, Any]) -> str:
        if unknown := sorted(name for name in extra_args if name.startswith(PREFIX) and name not in ARGS):
            raise BadInputError(f"unknown argument {', '.join(unknown)}: expected {', '.join(ARGS)}")
        name = extra_args.get(CAPTURE)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadInputError(
                f"{CAPTURE} must name a capture: up to 128 letters, digits, dots, underscores and hyphens, no dot first"
            )
        return name

    def _coverage(self, name: str, extra_args: Mapping[str, Any]) -> Coverage:
        """What the request asks for: what the capture holds, or, where there is none yet, what fits its buffers."""
        known = self._known.get(name)
        path = self.offer.lake / name
        if known is None and is_capture(place := open_backend(path)):
            root = read_root(place)
            known = root.identity, root.coverage
        asked = self._asked(extra_args, known and known[1])
        if known is None:
            known = self.identity.to_json(), asked
            choose_layout(asked, 0, self.offer.buffer_bytes, self.offer.shard_samples)
        mine = {"identity": self.identity.to_json(), "coverage": asked.to_json()}
        theirs = {"identity": known[0], "coverage": known[1].to_json()}
        differences = [
            f"{part} {field} is {theirs[part].get(field)!r}, asked for {mine[part].get(field)!r}"
            for part in mine
            for field in {**theirs[part], **mine[part]}
            if theirs[part].get(field) != mine[part].get(field)
        ]
        if differences:
            raise BadInputError(
                f"capture {name!r} holds other activations than these: {'; '.join(differences)}; name another capture"
            )
        self._known[name] = known
        return asked

    def _asked(self, extra_args: Mapping[str, Any], there: Coverage | None) -> Coverage:
        """Parse the arguments; what is not named is what is there, or else what is tapped."""
        offer = self.offer
        names, layers, positions = (_values(extra_args, arg) for arg in (SITES_ARG, LAYERS_ARG, POSITIONS_ARG))
        sites, named_layers = parse_sites(names, offer.model.family) if names else (
            there.sites if there else offer.sites, None,
        )  # fmt: skip
        if missing := [site for site in sites if site not in offer.sites]:
            raise BadInputError(f"{', '.join(missing)} is not tapped by this server: it taps {', '.join(offer.sites)}")
        if layers:
            numbers = parse_layers(",".join(map(str, layers)), offer.model.n_layers)
        else:
            numbers = named_layers or (there.layers if there else offer.layers)
        if not any(SITES[site].layered for site in sites):
            numbers = ()
        elif missing := [layer for layer in numbers if layer not in offer.layers]:
            raise BadInputError(f"layers {missing} are not tapped by this server: it taps {list(offer.layers)}")
        if positions:
            cells, tokens = parse_positions(positions)
        elif there:
            cells, tokens = there.positions, there.tokens
        else:
            cells, tokens = parse_positions(offer.positions)
        late = [name for name in cells if name in EXACT_ANSWER or POOLS.get(name, ("", ""))[1] == "exact_answer"]
        if late and offer.rules is None:
            raise BadInputError(f"{', '.join(late)}: nobody judges these answers, so no exact answer is found in them")
        widths = {site: offer.model.widths[SITES[site].width] for site in (*sites, EMBED)}
        return Coverage(sites, numbers, cells, widths, offer.model.dtype, tokens)


def _values(extra_args: Mapping[str, Any], name: str) -> list[str | int]:
    """A list of names or numbers, or a single one; [] where the argument is absent."""
    value = extra_args.get(name)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int) for item in values) or (value is not None and not values):
        raise BadInputError(f"{name} must be a list of names or whole numbers, with at least one")
    return values
