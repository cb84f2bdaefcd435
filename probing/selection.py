"""Selection: which samples of a capture, and which label, the probes of its cells are fitted on."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.errors import ProbeError, UnknownNameError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.positions import ABSENT, POOLS
from hiddenlake.cache.sites import parse_site
from hiddenlake.cache.store.reader import open_capture

# Names of the (positive, negative) class in a grid. A probe of `correct` detects errors: the wrong
# answers are its positive class, as in "LLMs Know More Than They Show".
_CLASSES = {"correct": ("wrong", "correct")}


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of one capture and site.

    data : the capture's Dataset, some layers and positions of it.  path : where it lies.  site : canonical name.
    mask : (position, sample) bool, whether the token is there, and in the answer where it must be.
    groups, index : (sample,) names that stay on one side of a split, and that tell samples apart.
    """

    data: xr.Dataset
    path: str
    site: str
    mask: np.ndarray
    groups: np.ndarray
    index: np.ndarray

    @property
    def identity(self) -> dict[str, Any]:
        """The value identity of the capture, whose nested names a Dataset's attributes join by dots."""
        identity: dict[str, Any] = {}
        for name, value in self.data.attrs.items():
            *outer, last = name.split(".")
            at = identity
            for part in outer:
                at = at.setdefault(part, {})
            at[last] = value
        identity.pop("capture", None)
        return identity

    @property
    def digest(self) -> str:
        """Of the identity."""
        return digest(self.identity)


@dataclass(frozen=True, slots=True)
class Selection(Samples):
    """Samples with a label that is true or false.

    label : the column.  positive, labelled : (sample,) bool, the positive class, and who has a label at all.
    names : of the positive and the negative class.
    """

    label: str
    positive: np.ndarray
    labelled: np.ndarray
    names: tuple[str, str]

    @property
    def positive_class(self) -> str:
        """In words."""
        return self.names[0] if self.label in _CLASSES else f"{self.label} is true"


def select(
    capture: Any,
    site: str,
    *,
    label: str,
    groups: str | None,
    layers: list[int] | None = None,
    positions: list[str] | None = None,
    in_answer: bool = True,
) -> Selection:
    """What fit_grid describes.

    in_answer : whether a token must lie in the answer; `last_q` and poolings never must.

    Raises ProbeError, UnknownNameError.
    """
    samples = select_samples(capture, site, groups=groups, layers=layers, positions=positions, in_answer=in_answer)
    value, labelled = _label(samples.data, label)
    return Selection(
        *(getattr(samples, field.name) for field in fields(Samples)), label, ~value if label in _CLASSES else value,
        labelled, _CLASSES.get(label, ("positive", "negative")),
    )  # fmt: skip


def select_samples(
    capture: Any,
    site: str,
    *,
    groups: str | None,
    layers: list[int] | None = None,
    positions: list[str] | None = None,
    in_answer: bool = True,
) -> Samples:
    """`select`, whatever the label is."""
    data, path = _open(capture)
    site = _site(data, site)
    data = _select(data, layers, positions)
    mask = data.token_index.transpose("position", "sample").values != ABSENT
    if in_answer:
        inside = data.in_answer.transpose("position", "sample").values.astype(bool)
        mask &= inside | np.isin(data.position.values.astype(str), ["last_q", *POOLS])[:, None]
    return Samples(data, path, site, mask, _groups(data, groups), _sample_names(data))


def _open(capture: Any) -> tuple[xr.Dataset, str]:
    if isinstance(capture, xr.Dataset):
        return capture, str(capture.attrs.get("capture", ""))
    if isinstance(capture, (str, Path)):
        capture = open_capture(capture)
    return capture.dataset(), str(capture.path)


def _site(data: xr.Dataset, name: str) -> str:
    layer, site = parse_site(name)
    there = sorted(str(v) for v in data.data_vars if {"layer", "position", "sample"} <= set(data[v].dims))
    if site not in there:
        raise UnknownNameError(f"the capture has no site {site!r}: it has {', '.join(there) or 'none with layers'}")
    if layer is not None:
        raise UnknownNameError(f"{name!r} names one layer, a grid has many: say site={site!r} and layers=[{layer}]")
    return site


def _select(data: xr.Dataset, layers: list[int] | None, positions: list[str] | None) -> xr.Dataset:
    for dim, wanted in (("layer", layers), ("position", positions)):
        if wanted is None:
            continue
        there = data[dim].values.tolist()
        wanted = [str(one) if dim == "position" else one for one in wanted]
        missing = [one for one in wanted if one not in there]
        if missing or not wanted:
            raise UnknownNameError(f"the capture has no {dim} {missing or '(none named)'}: it has {there}")
        data = data.isel({dim: [there.index(one) for one in wanted]})
    return data


def _columns(data: xr.Dataset) -> list[str]:
    return sorted(str(name) for name in data.variables if data[name].dims == ("sample",) and name != "sample")


def _label(data: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(value, whether there is one), each (sample,) bool."""
    values, there = label_values(data, name)
    if values.dtype == bool:
        return values, there
    found = set(values[there].tolist())
    if not found <= {0, 1}:
        raise ProbeError(
            f"label {name!r} has the values {sorted(map(str, found))[:5]}: expected true and false, or 1 and 0; "
            f"fit_multiclass_grid and `hiddenlake probe-classes` tell three or more apart"
        )
    return np.array([bool(ok and value) for value, ok in zip(values.tolist(), there, strict=True)], bool), there


def label_values(data: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """((sample,) values of a column, (sample,) bool whether there is one). Raises UnknownNameError, ProbeError."""
    if name not in _columns(data):
        raise UnknownNameError(f"no column {name!r}: the samples have {', '.join(_columns(data))}")
    values = data[name].values
    there = np.array([value is not None and value == value for value in values.tolist()], bool)
    if not there.any():
        raise ProbeError(f"no sample has a value of {name!r}: add the label, or name another column")
    return values, there


def _groups(data: xr.Dataset, name: str | None) -> np.ndarray:
    question = np.array([f"question {i}" for i in data["index"].values.tolist()], object)
    if name is None:
        return question.astype(str)
    if name == "gold":
        values = [answers[0] if len(answers) else "" for answers in data["answers"].values]
    elif name in _columns(data):
        values = data[name].values.tolist()
    else:
        raise UnknownNameError(f"no column {name!r}: groups are `gold`, None, or one of {', '.join(_columns(data))}")
    named = [str(value) if value is not None and value == value and str(value) else "" for value in values]
    return np.array([value or own for value, own in zip(named, question, strict=True)], str)


def _sample_names(data: xr.Dataset) -> np.ndarray:
    """Task index and sample index: the same in every capture of one run."""
    pairs = zip(data["index"].values.tolist(), data["sample_index"].values.tolist(), strict=True)
    return np.array([f"{index}/{sample}" for index, sample in pairs])
