"""Coverage: which cells a capture holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from hiddenlake.cache.errors import UnknownNameError
from hiddenlake.cache.positions import ABSENT, POOLED, POOLS, Tokens, parse_positions
from hiddenlake.cache.sites import SITES

EMBED = "embed"

# name -> (bits as the store moves them, the values' type, the quiet NaN of absent cells)
DTYPES = {
    "bfloat16": (np.dtype("<u2"), np.dtype(ml_dtypes.bfloat16), 0x7FC0),
    "float16": (np.dtype("<u2"), np.dtype("<f2"), 0x7E00),
    "float32": (np.dtype("<f4"), np.dtype("<f4"), np.nan),
}

# name -> the bits of infinity: what is not below them, sign aside, is not finite
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which activations a capture holds: cells, a full box of layers x positions for each site, and tokens, a full
    box of layers x some tokens of each sample; both of `embed` too.

    sites : names of sites, in the order of the site table. `embed` is not named.
    layers : 0-based block indices, ascending. () where no site has layers, whatever was given.
    positions : names, in the order of the store's position axis. () where only tokens are stored.
    widths : last axis of each site, in elements. `embed` may be left out beside another site as wide as it.
    dtype : `bfloat16`, `float16` or `float32`, as stored.
    tokens : which tokens of each sample are stored, or None for none.

    Raises ValueError (UnknownNameError for a name that does not exist).
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    widths: dict[str, int]
    dtype: str = "bfloat16"
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        for name in ("sites", "layers", "positions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        known = [site for site in SITES if site != EMBED]
        for site in self.sites:
            if site not in known:
                raise UnknownNameError(f"site {site!r} cannot be covered: expected one of {', '.join(known)}")
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites {self.sites}: expected at least one site, each once")
        if not any(SITES[site].layered for site in self.sites):
            object.__setattr__(self, "layers", ())
        elif not all(type(layer) is int and layer < 1 << 31 for layer in self.layers):
            raise ValueError(f"layers {self.layers}: expected whole numbers")
        elif not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers {self.layers}: expected ascending 0-based block indices, each once")
        if not self.positions and self.tokens is None:
            raise ValueError("neither positions nor tokens are given: expected one of them")
        if self.positions and parse_positions(self.positions) != (self.positions, None):
            raise ValueError(f"positions {self.positions}: expected canonical names, each once; use parse_positions")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        self._check_widths()

    def _check_widths(self) -> None:
        as_embed = [self.widths.get(site) for site in self.sites if SITES[site].width == SITES[EMBED].width]
        given = {EMBED: as_embed[0]} | self.widths if as_embed else self.widths
        if set(given) != {EMBED, *self.sites} or None in given.values():
            raise ValueError(
                f"widths are of {sorted(self.widths)}: expected one for each of {[*self.sites, EMBED]}; "
                f"{EMBED} may be left out beside another site of kind {SITES[EMBED].width}"
            )
        widths = {site: int(given[site]) for site in (EMBED, *self.sites)}
        by_kind: dict[str, set[int]] = {}
        for site, width in widths.items():
            by_kind.setdefault(SITES[site].width, set()).add(width)
        if any(len(found) > 1 or min(found) < 1 for found in by_kind.values()):
            raise ValueError(f"widths {widths}: expected one positive width for all sites of a kind")
        object.__setattr__(self, "widths", widths)

    def check_token_index(self, token_index: Sequence[int], total_length: int) -> None:
        """Raise ValueError unless each position has a token of the sample, or -1; a pooled one has -2, or -1."""
        if len(token_index) != len(self.positions):
            raise ValueError(f"token_index has {len(token_index)} entries for {self.positions}")
        for name, index in zip(self.positions, token_index, strict=True):
            if index == ABSENT or (index == POOLED if name in POOLS else 0 <= index < total_length):
                continue
            expected = POOLED if name in POOLS else f"0 to {total_length - 1}"
            raise ValueError(f"token_index of {name} is {index}: expected {expected}, or {ABSENT} where it is absent")

    def check_tokens(self, length: int, prompt_length: int, total_length: int, complete: bool) -> None:
        """Raise ValueError unless so many tokens of a sample are stored as there are.

        complete : whether nothing is known to be missing; else the sequence's last token may be.
        """
        wanted = self.tokens.indices(prompt_length, total_length) if self.tokens else range(0)
        may_lack = not complete and total_length - 1 in wanted
        if length != len(wanted) and not (may_lack and length == len(wanted) - 1):
            raise ValueError(f"{length} tokens of a sample are stored: expected the {len(wanted)} of {self.tokens}")

    def to_json(self) -> dict[str, Any]:
        facts = {
            "sites": list(self.sites),
            "layers": list(self.layers),
            "positions": list(self.positions),
            "widths": dict(self.widths),
            "dtype": self.dtype,
        }
        # Left out where there are none, as in captures that were made before there were any.
        return facts if self.tokens is None else facts | {"tokens": str(self.tokens)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Coverage":
        return cls(
            tuple(data["sites"]),
            tuple(data["layers"]),
            tuple(data["positions"]),
            dict(data["widths"]),
            data["dtype"],
            Tokens.parse(data["tokens"]) if "tokens" in data else None,
        )

    def __hash__(self) -> int:
        return hash((self.sites, self.layers, self.positions, tuple(self.widths.items()), self.dtype, self.tokens))
