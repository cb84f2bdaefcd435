"""Spot check: some stored samples against Hugging Face, computed anew from their token ids."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.engines.transformers import TransformersEngine
from hiddenlake.cache.errors import BadInputError, IdentityError, StoreError
from hiddenlake.cache.identity import Decoding
from hiddenlake.cache.model import Model, load_model
from hiddenlake.cache.pools import Pool, widen
from hiddenlake.cache.positions import ABSENT, POOLED, POOLS, span_of
from hiddenlake.cache.rows import Block, TapTable
from hiddenlake.cache.spans import find_window
from hiddenlake.cache.store.reader import Capture
from hiddenlake.cache.store.signing import to_json_bytes
from hiddenlake.cache.store.verify import SPOT_CHECK

# Largest relative L2 error of any row, and the largest median over rows. Float32 rounding was measured at 3e-5.
# In bfloat16, Hugging Face itself differs from float32 by up to 0.23 at tokens with massive activations, and by
# 0.02 in the median; vLLM is as far from it.
TOLERANCE = {"float32": (1e-4, 1e-5), "float16": (0.05, 0.004), "bfloat16": (0.35, 0.03)}

# A token that rounding sends to other experts has other values altogether, as happens to 0.5 % of the rows of Hugging
# Face itself (bfloat16 beside float32, up to 1.2 in small models): there the median decides.
_ROUTED_WORST = 2.0


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
    if capture.identity["lora"] is not None:
        raise BadInputError(
            "this capture was made with a LoRA adapter, which the reference engine does not load: merge the adapter into "
            "the model, and check a capture of that"
        )
    if capture.identity["quantization"] is not None:
        raise BadInputError(
            "this capture was made with quantised weights, which the reference engine was not tested with: check a capture of "
            "the unquantised model"
        )
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
            tokens=coverage.tokens,
            decoding=Decoding(0),
            max_length=source.context,
            ring_bytes=1 << 62,  # teacher-forced rows do not wait
            lora=None,
            options={"batch_size": 1},
        )
    )
    engine.start(())
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(capture), min(samples, len(capture)), replace=False).tolist())
    errors: list[np.ndarray] = []
    for row, sample in zip(chosen, capture.samples().take(chosen).to_pylist(), strict=True):
        ids = sample["token_ids"]
        [rows], _ = engine.teacher_force([ids], [range(len(ids))], [sample["prompt_length"]])
        errors += _errors(capture, engine.table, source, row, sample, rows)
    engine.close()
    every = np.concatenate(errors)
    worst, median = TOLERANCE[source.dtype]
    if source.dtype != "float32" and "mlp_act" not in source.family.sites:
        worst = _ROUTED_WORST
    result = SpotCheck(len(chosen), every.size, float(every.max()), float(np.median(every)), worst, median)
    with suppress(StoreError):
        capture.place.write(SPOT_CHECK, to_json_bytes(result.to_json()))
    return result


def _errors(
    capture: Capture, table: TapTable, model: Model, row: int, sample: dict[str, Any], rows: np.ndarray
) -> list[np.ndarray]:
    """Relative L2 errors of one sample's stored values. rows : (token, element), every token of it, computed anew."""
    coverage = capture.coverage
    q, n = sample["prompt_length"], sample["total_length"]
    window = None
    if sample["exact_answer_valid"]:
        window = find_window(model.decode, sample["token_ids"][q:], sample["exact_answer"])
        window = window and (q + window[0], q + window[1])
    columns, cells = [], []
    for p, (name, token) in enumerate(zip(coverage.positions, sample["token_index"], strict=True)):
        if token == ABSENT:
            continue
        columns.append(p)
        if token != POOLED:
            cells.append(rows[token])
            continue
        function, span = POOLS[name][0], span_of(name, q, n, window)
        total = Pool((function,))
        total.add(rows[span.start : span.stop])
        cells.append(total.result(function))
    errors = []
    for block in table.blocks:
        if columns:
            found = capture.read(block.site, samples=row, dtype="float32")[..., columns, :]
            errors.append(_relative(found, _of_block(widen(np.stack(cells)), block)))
        if coverage.tokens is not None:
            stored = capture.read_tokens(block.site, samples=row, dtype="float32")
            if len(stored.token_index):
                errors.append(_relative(stored.values, _of_block(widen(rows[stored.token_index]), block)))
    return errors


def _of_block(rows: np.ndarray, block: Block) -> np.ndarray:
    """(layer, token, width) of a site, or (token, width), from packed rows (token, element)."""
    values = rows[:, block.offset : block.end]
    return values.reshape(len(rows), -1, block.width).transpose(1, 0, 2) if block.layers else values


def _relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).ravel()
