"""Plans: how a group of answers is computed, and into which capture they go."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.identity import Decoding, Sampling, canonical_json, digest, model_key
from hiddenlake.cache.positions import EXACT_ANSWER, NAMED, POOLS, Tokens, parse_positions
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import EMBED, Coverage

# Of captures that a service has made.
TASK = "resolved"


@dataclass(frozen=True, slots=True)
class Offer:
    """What workers of one model can compute.

    path : of the model, for whoever reads its tokenizer.
    identity : the fields of a value identity that follow from the model.
    sites, layers : that are tapped.  widths : site -> elements, `embed` too.
    max_prompt, max_new_tokens : longest, in tokens.  vocabulary : token ids are below it.
    """

    path: str
    identity: dict[str, Any]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    widths: dict[str, int]
    dtype: str
    max_prompt: int
    max_new_tokens: int
    vocabulary: int

    @property
    def id(self) -> str:
        return model_key(self.identity)

    @property
    def name(self) -> str:
        return self.identity["model"]

    def joined(self, other: "Offer") -> "Offer":
        """The same model with the other's sites and layers too."""
        return replace(
            self,
            sites=tuple(dict.fromkeys((*self.sites, *other.sites))),
            layers=tuple(sorted({*self.layers, *other.layers})),
            widths=other.widths | self.widths,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Offer":
        return cls(**{**value, "sites": tuple(value["sites"]), "layers": tuple(value["layers"])})


@dataclass(frozen=True, slots=True)
class Plan:
    """What is captured of an answer, and how it comes about. sites, layers, positions : canonical, in the coverage's order.

    tokens : token-level coverage, or None.  seed of sampling : of the whole request; each answer has its own.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    tokens: str | None
    decoding: Decoding

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Plan":
        decoding = value["decoding"]
        sampling = Sampling(**{**decoding["sampling"], "stop": tuple(decoding["sampling"]["stop"])})
        return cls(
            tuple(value["sites"]), tuple(value["layers"]), tuple(value["positions"]), value["tokens"],
            Decoding(decoding["max_new_tokens"], sampling),
        )  # fmt: skip

    @property
    def id(self) -> str:
        return digest(self.to_json())

    def coverage(self, offer: Offer) -> Coverage:
        widths = {site: offer.widths[site] for site in (*self.sites, EMBED)}
        tokens = None if self.tokens is None else Tokens.parse(self.tokens)
        return Coverage(self.sites, self.layers, self.positions, widths, offer.dtype, tokens)

    def identity(self, offer: Offer, tenant: str) -> dict[str, Any]:
        """The value identity of the capture that its answers go into."""
        own = {"task": TASK, "judge": "none", "decoding": self.decoding.to_json()}
        return offer.identity | own | ({"tenant": tenant} if tenant else {})

    def capture(self, offer: Offer, tenant: str) -> str:
        """That capture's name: it says what is in it, so that all workers come to the same."""
        content = canonical_json([self.identity(offer, tenant), self.coverage(offer).to_json()])
        return f"{TASK}-{digest(content.decode())[:16]}"

    def sample_bytes(self, offer: Offer, length: int) -> int:
        """Most bytes that an answer takes in the store. length : of prompt and answer, in tokens."""
        coverage, item = self.coverage(offer), {"float32": 4}.get(offer.dtype, 2)
        row = sum(
            offer.widths[site] * (len(self.layers) if SITES[site].layered else 1) for site in (*self.sites, EMBED)
        )
        tokens = 0 if coverage.tokens is None else -(-length // coverage.tokens.every)
        return row * item * (len(self.positions) + tokens)


def make_plan(
    offer: Offer, sites: Iterable[str], layers: Iterable[int], positions: Iterable[str | int], decoding: Decoding
) -> Plan:
    """Parse and check what a request asks for.

    positions : as `hiddenlake.capture` takes them.

    Raises BadInputError, UnknownNameError.
    """
    wanted = dict.fromkeys(sites)
    wanted.pop(EMBED, None)  # every capture has it
    if not wanted or (missing := [site for site in wanted if site not in offer.sites]):
        # Without the names that were asked for: one may be a text that went astray.
        raise BadInputError(
            f"{len(missing) if wanted else 'all'} sites are not there: there are {', '.join(offer.sites)}"
        )
    layers = tuple(sorted(set(layers)))
    if missing := [layer for layer in layers if layer not in offer.layers]:
        raise BadInputError(f"layers {missing} are not there: there are {list(offer.layers)}")
    if not any(SITES[site].layered for site in wanted):
        layers = ()
    elif not layers:
        raise BadInputError("layers is empty: name at least one, or leave it out for all")
    try:
        names, tokens = parse_positions(positions)
    except UnknownNameError:
        raise BadInputError(
            f"positions: expected integers, names ({', '.join(NAMED)}), poolings ({', '.join(POOLS)}), and one of all, "
            f"all_prompt and all_generated, with /k for every k-th token"
        ) from None
    late = [name for name in names if name in EXACT_ANSWER or POOLS.get(name, ("", ""))[1] == "exact_answer"]
    if late:
        raise BadInputError(
            f"{', '.join(late)}: nobody judges these answers, so no exact answer is found in them; the captures of tasks have it"
        )
    # In one order, so that the same cells are one plan however they were listed.
    ordered = tuple(site for site in SITES if site in wanted)
    return Plan(ordered, layers, tuple(sorted(names)), None if tokens is None else str(tokens), decoding)


def covers(coverage: Coverage, plan: Plan) -> bool:
    """Whether a capture of this coverage holds all that a plan asks for."""
    tokens = None if plan.tokens is None else Tokens.parse(plan.tokens)
    same_tokens = tokens is None or (
        coverage.tokens is not None
        and (coverage.tokens == tokens or (coverage.tokens.part in ("all", tokens.part) and coverage.tokens.every == 1))
    )
    return (
        set(plan.sites) <= set(coverage.sites)
        and set(plan.layers) <= set(coverage.layers)
        and set(plan.positions) <= set(coverage.positions)
        and same_tokens
    )
