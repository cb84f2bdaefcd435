"""Probe: one fitted direction of one cell, kept with its certificate and with what it was trained on.

A file is safetensors: `coef` (d,) and `intercept` (1,), float64, in the coordinates of the stored activations, and a
JSON header under `hiddenlake.probe`.
"""

import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.errors import BadInputError, IdentityError, ProbeError, StoreError
from hiddenlake.cache.exchange.tensor_file import TensorFile, header

if TYPE_CHECKING:
    import xarray as xr

    from hiddenlake.cache.store.reader import Capture

# What says of which texts an identity speaks, and not of which numbers a text gives.
_OF_TEXTS = ("task", "judge", "decoding")

# Rows that are scored at a time: of a width of 8192, 400 MB as they are read and widened.
_BLOCK = 4096

_HEADER = "hiddenlake.probe"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Probe:
    """Scores of stored activations x are x . coef + intercept: the log-odds of the positive class.

    coef : (d,) float64, of the activations as they are stored: scaling and centring are folded in.
    site, layer, position : the cell.  label, positive_class : what it tells, and of what its probability is.
    identity : of the capture that it was trained on.
    fit : C, scale, solver, tol, n, n_positive, objective, gap_bound, converged; and of its cross-validation auc, auc_lo,
        auc_hi, folds, groups.
    """

    coef: np.ndarray
    intercept: float
    site: str
    layer: int
    position: str
    label: str
    positive_class: str
    identity: dict[str, Any]
    fit: dict[str, Any] = field(default_factory=dict)

    @property
    def coef_(self) -> np.ndarray:
        """(1, d), as scikit-learn has it."""
        return self.coef[None]

    @property
    def intercept_(self) -> np.ndarray:
        """(1,)."""
        return np.array([self.intercept])

    @property
    def classes_(self) -> np.ndarray:
        """The second is the positive class."""
        return np.array([False, True])

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """(n,) float64 log-odds of (n, d) activations."""
        X = np.asarray(X)
        if X.ndim != 2 or X.shape[1] != len(self.coef):
            raise ProbeError(f"activations have the shape {X.shape}: expected (n, {len(self.coef)})")
        return X.astype(np.float64) @ self.coef + self.intercept

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """(n, 2) probabilities of both classes."""
        odds = self.decision_function(X)
        return np.stack([probability_of(-odds), probability_of(odds)], axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """(n,) bool."""
        return self.decision_function(X) > 0

    def to_sklearn(self) -> Any:
        """A LogisticRegression that is fitted."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.fit.get("C", 1.0))
        model.coef_, model.intercept_, model.classes_ = self.coef_.copy(), self.intercept_, self.classes_
        model.n_features_in_, model.n_iter_ = len(self.coef), np.array([self.fit.get("n_iter", 0)], np.int32)
        return model

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all. Raises StoreError."""
        path = Path(path)
        facts = asdict(self) | {"format": _FORMAT, "hiddenlake": version("hiddenlake")}
        tensors = {"coef": np.asarray(facts.pop("coef"), "<f8"), "intercept": np.array([facts.pop("intercept")], "<f8")}
        shapes = {name: ("F64", values.shape) for name, values in tensors.items()}
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(
                header(shapes, {_HEADER: json.dumps(facts)}) + b"".join(t.tobytes() for t in tensors.values())
            )
            os.replace(new, path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}: the probe was not saved") from error
        finally:
            with suppress(OSError):
                new.unlink()
        return path


def load_probe(path: str | Path) -> Probe:
    """Read a probe. Raises BadInputError for what is none."""
    path = Path(path)
    with TensorFile(path) as file:
        try:
            facts = json.loads(file.metadata[_HEADER])
            form, _ = facts.pop("format"), facts.pop("hiddenlake")
            arrays = {name: file.read(name) for name in ("coef", "intercept")}
            probe = Probe(coef=arrays["coef"], intercept=float(arrays["intercept"][0]), **facts)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BadInputError(f"{path} holds no probe: expected a file that hiddenlake saved") from error
    if form != _FORMAT:
        raise BadInputError(
            f"{path} is a probe of another version of hiddenlake ({form}, expected {_FORMAT}): fit it again"
        )
    if probe.coef.ndim != 1 or probe.coef.dtype != np.float64 or not np.isfinite([*probe.coef, probe.intercept]).all():
        raise BadInputError(f"{path}: coef is {probe.coef.shape} {probe.coef.dtype}: expected finite float64 weights")
    return probe


def score_capture(probe: Probe, capture: Any, force: bool = False) -> "xr.Dataset":
    """A probe's scores of all samples of a capture.

    capture : a path or an open capture.
    force : also where its activations are other numbers: of another model, other weights, another precision or chat
        template. The result is marked then.

    Returns over (sample): score (log-odds), probability; NaN where the token is absent. attrs: the probe's cell and
    identity, `forced`, and `differs`, which fields of the identity do.

    Raises IdentityError, and what reading does.
    """
    import xarray as xr

    from hiddenlake.cache.store.reader import Capture, open_capture

    capture = capture if isinstance(capture, Capture) else open_capture(capture)
    score = score_rows(probe, capture, np.arange(len(capture)), force)
    differs = different_fields(probe.identity, capture.identity)
    return xr.Dataset(
        {"score": ("sample", score), "probability": ("sample", probability_of(score))},
        coords={"sample": np.array(capture.keys, object)},
        attrs={
            "site": probe.site, "layer": probe.layer, "position": probe.position, "label": probe.label,
            "positive_class": probe.positive_class, "capture": str(capture.path), "forced": bool(differs),
            "differs": ", ".join(differs), "trained_on": str(probe.identity.get("task", "")),
        },
    )  # fmt: skip


def score_rows(probe: Probe, capture: "Capture", rows: np.ndarray, force: bool = False) -> np.ndarray:
    """Log-odds of some samples of a capture, (n,) float64, read a block at a time; NaN where the token is absent.

    rows : (n,) int, in task order.  force : as in `score_capture`.

    Raises IdentityError, and what reading does.
    """
    refuse_other_identity(probe, capture, force)
    score = np.full(len(rows), np.nan)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].tolist()
        X = capture.read(probe.site, probe.layer, probe.position, block, dtype="float32")
        there = np.isfinite(X).all(axis=1)
        score[start + np.flatnonzero(there)] = probe.decision_function(X[there])
    return score


def probability_of(odds: np.ndarray) -> np.ndarray:
    """Of log-odds, without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.exp(-np.logaddexp(0.0, -odds))


def refuse_other_identity(probe: Probe, capture: "Capture", force: bool = False) -> None:
    """Raises IdentityError where a capture's activations are other numbers than those that a probe was trained on."""
    differs = different_fields(probe.identity, capture.identity)
    if differs and not force:
        raise IdentityError(
            f"{capture.path} holds activations of another identity than the probe was trained on: {', '.join(differs)} "
            f"differ: score a capture of the same model, or force it"
        )


def different_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which fields of two identities make other numbers of the same text."""
    return sorted(
        name for name in {*one, *other} if name not in _OF_TEXTS and one.get(name, None) != other.get(name, None)
    )
