"""Spot check: some stored samples against Hugging Face, computed anew from their token ids."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.engines.transformers import TransformersEngine
from hiddenlake.cache.errors import BadInputError, IdentityError, StoreError
from hiddenlake.cache.model import load_model
from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.store.files import write_atomic
from hiddenlake.cache.store.layout import to_json_bytes
from hiddenlake.cache.store.reader import Capture, widen

# Largest relative L2 error of any row, and the largest median over rows. Float32 rounding was measured at 3e-5.
# In bfloat16, Hugging Face itself differs from float32 by up to 0.23 at tokens with massive activations, and by
# 0.02 in the median; vLLM is as far from it.
TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (0.35, 0.03)}


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """What a spot check found. Errors are relative L2 errors of rows, over all layers, sites and positions."""

    samples: int
    rows: int
    worst: float
    median: float
    worst_allowed: float
    median_allowed: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.worst_allowed and self.median <= self.median_allowed

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def spot_check(capture: Capture, model: str | os.PathLike[str], samples: int, seed: int = 0) -> SpotCheck:
    """Compare randomly chosen samples with Hugging Face, teacher-forced on the ids that are stored.

    model : folder or hub id of the model that was captured. Raises IdentityError for another one.

    The result is kept as spot_check.json in the capture, where that can be written.
    """
    if samples < 1:
        raise BadInputError(f"a spot check of {samples} samples: expected 1 or more")
    source = load_model(model, capture.identity["compute_dtype"])
    if source.weights != capture.identity["weights"]:
        raise IdentityError(
            f"{model} has the weights {source.weights}, the capture was made with {capture.identity['weights']}: "
            f"pass the model that was captured"
        )
    coverage = capture.coverage
    engine = TransformersEngine(
        Request(
            model=source,
            sites=coverage.sites,
            layers=coverage.layers,
            positions=coverage.positions,
            max_new_tokens=1,
            max_length=source.context,
            ring_bytes=1 << 62,  # teacher-forced rows do not wait
            options={"batch_size": 1},
        )
    )
    table = TapTable(coverage.sites, coverage.layers, source.n_layers)
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(capture), min(samples, len(capture)), replace=False).tolist())
    rows = capture.samples().take(chosen).to_pylist()
    stored = {site: capture.read(site, samples=chosen, dtype="float32") for site in (*coverage.sites, "embed")}
    errors: list[np.ndarray] = []
    for i, sample in enumerate(rows):
        tokens = [token for token in sample["token_index"] if token >= 0]
        columns = [p for p, token in enumerate(sample["token_index"]) if token >= 0]
        [block], _ = engine.teacher_force([sample["token_ids"]], [tokens], [sample["prompt_length"]])
        block = block if block.dtype == np.float32 else widen(block)
        for site, values in stored.items():
            expected = block[table.of_site(site)]
            found = values[..., columns, i, :]
            if site == "embed":
                expected = expected[0]
            scale = np.linalg.norm(expected, axis=-1)
            errors.append((np.linalg.norm(found - expected, axis=-1) / scale).ravel())
    engine.close()
    every = np.concatenate(errors)
    worst, median = TOLERANCE[source.dtype]
    result = SpotCheck(len(rows), every.size, float(every.max()), float(np.median(every)), worst, median)
    with suppress(StoreError):
        write_atomic(capture.path / "spot_check.json", to_json_bytes(result.to_json()))
    return result

