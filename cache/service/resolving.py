"""Resolving: prompts to answers that are stored, or to work that is on its way."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from hiddenlake.cache.identity import Decoding, answer_key, digest
from hiddenlake.cache.service.asked import Input, ResolveRequest
from hiddenlake.cache.service.encoder import Encoder
from hiddenlake.cache.service.holdings import Holdings
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.lookup import Lookup
from hiddenlake.cache.service.plans import Offer, Plan, make_plan
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.service.work import Wanted, Work

# Token ids of texts that are remembered: a page of prompts that is asked for again and again.
_REMEMBERED = 20_000

# How long the models that captures are of are believed to be as they were: each look goes through all captures.
_FRESH_SECONDS = 1.0

# Of a model that nobody computes with.
_NO_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that is asked for, and where it lies: (capture, sample), or None."""

    input: int
    sample_index: int
    wanted: Wanted
    place: tuple[str, str] | None


class Resolver:
    """Of one server. May be used from several threads."""

    def __init__(self, settings: Settings, lake: Lake, work: Work, lookup: Lookup, holdings: Holdings) -> None:
        self._settings, self._lake, self._work, self._lookup = settings, lake, work, lookup
        self._holdings = holdings
        self._encoder = Encoder()
        self._lock = Lock()
        self._ids: OrderedDict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = OrderedDict()
        self._captured: dict[str | None, tuple[float, dict[str, Offer]]] = {}

    def close(self) -> None:
        self._encoder.close()

    def offers(self, caller: Caller) -> dict[str, Offer]:
        """model_key -> what can be asked of it: of workers that run or ran, and of the captures that the caller sees."""
        return self._joined(self._work.offers(), caller)

    def _joined(self, worked: dict[str, Offer], caller: Caller) -> dict[str, Offer]:
        with self._lock:
            when, found = self._captured.get(caller.tenant, (-_FRESH_SECONDS, {}))
        if time.monotonic() - when >= _FRESH_SECONDS:
            when, found = time.monotonic(), _captured(self._lake, caller)
            with self._lock:
                self._captured[caller.tenant] = when, found
        return found | {id: offer.joined(found[id]) if id in found else offer for id, offer in worked.items()}

    def look(self, request: ResolveRequest, caller: Caller) -> tuple[Offer, Plan, list[Answer]]:
        """What is asked for, and where it lies. Raises Problem, BadInputError, UnknownNameError."""
        worked = self._work.offers()
        offer = _offer(request.model, self._joined(worked, caller))
        decoding = Decoding(0) if request.generation is None else request.generation.decoding()
        # What is not named is what would be computed.
        usual = worked.get(offer.id, offer)
        sites = usual.sites if request.sites is None else request.sites
        layers = usual.layers if request.layers is None else request.layers
        plan = make_plan(offer, sites, layers, request.positions, decoding)
        ids = self._encode(offer, request.inputs)
        samples = 1 if request.generation is None else request.generation.samples
        self._check(plan, ids, samples)
        model, said = offer.id, decoding.to_json()
        wanted = []
        for number, (prompt, given) in enumerate(ids):
            size = plan.sample_bytes(offer, len(prompt) + (len(given) if given else decoding.max_new_tokens))
            for k in range(samples):
                seed = decoding.sampling.seed_of(0, k)
                fed = (given or ()) if request.generation is None else None
                wanted.append((number, k, Wanted(answer_key(model, said, prompt, fed, seed), prompt, fed, seed, size)))
        places = self._lookup.find(list(dict.fromkeys(w.key for _, _, w in wanted)), plan, caller)
        for name in {capture for capture, _ in places.values()}:
            self._holdings.use(name)
        return offer, plan, [Answer(number, k, w, places.get(w.key)) for number, k, w in wanted]

    def _encode(self, offer: Offer, inputs: Sequence[Input]) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
        """(prompt, given) ids of each input."""
        found: list[Any] = [None] * len(inputs)
        names: dict[int, str] = {}
        with self._lock:
            for i, item in enumerate(inputs):
                if item.token_ids is not None:
                    found[i] = item.token_ids, item.answer_ids
                    continue
                names[i] = digest([offer.id, item.texts()])
                if (known := self._ids.get(names[i])) is not None:
                    self._ids.move_to_end(names[i])
                    found[i] = known
        missing = [i for i, ids in enumerate(found) if ids is None]
        if not missing:
            return found
        if not offer.path:
            raise Problem(
                422, "no_tokenizer", "this model's tokenizer is not known here: no worker of it has run on this lake",
                "send `token_ids`, or start a worker of the model",
            )  # fmt: skip
        encoded = self._encoder.encode(offer.path, [inputs[i].texts() for i in missing])
        with self._lock:
            for i, ids in zip(missing, encoded, strict=True):
                given = None if ids["given"] is None else tuple(ids["given"])
                found[i] = self._ids[names[i]] = tuple(ids["prompt"]), given
            while len(self._ids) > _REMEMBERED:
                self._ids.popitem(last=False)
        return found

    def _check(self, plan: Plan, ids: Sequence[tuple[Any, Any]], samples: int) -> None:
        """Raises Problem for more than this server takes in one request."""
        settings = self._settings
        new = plan.decoding.max_new_tokens
        if len(ids) * samples > settings.max_inputs:
            raise Problem(
                413, "too_many_inputs", f"{len(ids)} inputs with {samples} answers each: at most {settings.max_inputs} answers",
                "ask in several requests",
            )  # fmt: skip
        total = sum(len(prompt) + len(given or ()) + new for prompt, given in ids) * samples
        if total > settings.max_tokens:
            raise Problem(
                413, "too_many_tokens", f"up to {total} tokens: at most {settings.max_tokens} in one request",
                "ask in several requests, or for shorter answers",
            )  # fmt: skip

    def admit(self, offer: Offer, plan: Plan, missing: Sequence[Wanted]) -> None:
        """Raises Problem where these answers, or so many more, cannot be computed now."""
        settings = self._settings
        worker = self._work.offers(alive_within=settings.patience).get(offer.id)
        if worker is None:
            raise Problem(
                503, "no_worker", f"no worker of {offer.name} runs", "start one: `hiddenlake worker LAKE --model M`",
                headers={"Retry-After": "30"},
            )  # fmt: skip
        _check_offered(worker, plan, missing)
        size, waiting = sum(one.bytes for one in missing), self._work.waiting_bytes()
        if size > settings.max_queue:
            raise Problem(
                413, "too_large", f"the answers would take {size} bytes, at most {settings.max_queue} may wait",
                "ask for fewer inputs, layers or positions at once",
            )  # fmt: skip
        if waiting + size > settings.max_queue:
            raise Problem(
                429, "queue_full", f"answers of {waiting} bytes wait already, at most {settings.max_queue} may",
                "wait, and ask again", headers={"Retry-After": "5"},
            )  # fmt: skip
        if settings.quota is not None and (staying := self._holdings.bytes_staying()) + waiting + size > settings.quota:
            raise Problem(
                507, "quota", f"the answers would take {size} bytes; {staying + waiting} of {settings.quota} are taken by what "
                f"was used just now, is pinned, or waits", "wait, or have captures unpinned or removed",
                headers={"Retry-After": "60"},
            )  # fmt: skip
        free = self._lake.place.free_bytes()
        if free is not None and free - waiting - size < settings.min_free:
            raise Problem(
                507, "no_room", f"the answers would take {size} bytes, {free} are free, and {settings.min_free} must stay so",
                "make room on the lake's disk",
            )  # fmt: skip


def _offer(name: str | None, offers: dict[str, Offer]) -> Offer:
    """A model by name or id. Raises Problem."""
    chosen = [offer for offer in offers.values() if name in (None, offer.id, offer.name)]
    there = {"models": [{"id": offer.id, "name": offer.name} for offer in offers.values()]}
    if not chosen:
        raise Problem(404, "no_model", "there is no such model here", "GET /v1/models lists them", there=there)
    if len(chosen) > 1:
        raise Problem(409, "which_model", f"{len(chosen)} models are meant by that", "name one by its id", there=there)
    return chosen[0]


def _check_offered(worker: Offer, plan: Plan, missing: Sequence[Wanted]) -> None:
    """Raises Problem for what workers of this model do not tap, or do not take."""
    there = {"sites": list(worker.sites), "layers": list(worker.layers)}
    if not set(plan.sites) <= set(worker.sites) or not set(plan.layers) <= set(worker.layers):
        raise Problem(
            409, "not_tapped", "not all of these sites and layers are there, and this model's workers do not tap them",
            "ask for what is tapped, or start a worker that taps more", there=there,
        )  # fmt: skip
    if plan.decoding.max_new_tokens > worker.max_new_tokens:
        raise Problem(
            413, "too_long", f"max_new_tokens is {plan.decoding.max_new_tokens}: this model's workers answer in at most "
            f"{worker.max_new_tokens}", "ask for shorter answers",
        )  # fmt: skip
    for one in missing:
        fed = (*one.prompt, *(one.given or ()))
        if len(fed) > worker.max_prompt:
            raise Problem(
                413, "too_long", f"an input has {len(fed)} tokens: this model's workers take {worker.max_prompt}",
                "send a shorter one",
            )  # fmt: skip
        if not fed or max(fed) >= worker.vocabulary:
            raise Problem(
                422, "bad_input", f"an input has no tokens, or ids of {worker.vocabulary} or more",
                "send ids of this model's vocabulary",
            )  # fmt: skip


def _captured(lake: Lake, caller: Caller) -> dict[str, Offer]:
    """Models whose activations are there, as far as their captures tell."""
    found: dict[str, Offer] = {}
    for _, capture in lake.captures(caller):
        if isinstance(capture, Exception) or "decoding" not in capture.identity:
            continue
        identity, c = dict(capture.identity), capture.coverage
        for own in ("task", "judge", "decoding", "tenant"):
            identity.pop(own, None)
        own = Offer("", identity, c.sites, c.layers, dict(c.widths), c.dtype, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT)
        found[own.id] = own.joined(found[own.id]) if own.id in found else own
    return found
