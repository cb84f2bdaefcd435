"""Synthetic captures: what a capture's dataset() returns, with a signal planted where a test wants it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_writer

POSITIONS = ("last_q", "first_answer", "second_answer", "exact_answer_first", "exact_answer_last",
             "exact_answer_after_last", "-2", "-1")  # fmt: skip


@pytest.fixture(scope="session")
def make_capture() -> Callable[..., xr.Dataset]:
    return synthetic_capture


@pytest.fixture(scope="session")
def store_capture() -> Callable[..., Path]:
    return write_capture


def write_capture(data: xr.Dataset, path: Path, identity: dict[str, Any]) -> Path:
    """The same on disk, its samples in any order of arrival."""
    n, width = data.sizes["sample"], data.sizes["hidden"]
    positions = tuple(data.position.values.tolist())
    coverage = Coverage(("mlp_out",), tuple(data.layer.values.tolist()), positions, {"mlp_out": width}, "float32")
    arrival = np.random.default_rng(0).permutation(n)
    with open_writer(path, identity=identity, coverage=coverage, provenance={}, planned=n, shard_samples=64) as writer:
        writer.reserve(data.sample.values.tolist(), n)
        for i in arrival.tolist():
            shard, slot = writer.slot()
            there = data.token_index.values[:, i] >= 0
            for site, view in shard.views.items():
                rows = data[site].isel(sample=i).values
                view[..., there, slot, :] = rows[..., there, :].view(view.dtype)
            writer.add(shard, slot, _sample(data, i))
    return path


def _sample(data: xr.Dataset, i: int) -> Sample:
    at = data.isel(sample=i)
    prompt, total = int(at.prompt_length), int(at.total_length)
    exact = at.exact_answer.item()  # xarray has NaN for None
    return Sample(
        str(at.sample.item()), int(at["index"]), int(at["sample_index"]), str(at.group.item()), f"prompt of {at.group.item()}", "answer",
        tuple(at.answers.item()), bool(at.correct), exact if isinstance(exact, str) else None, bool(at.exact_answer_valid),
        tuple(np.asarray(at.token_ids.item()).tolist()), (-0.5,) * (total - prompt), prompt, total, "stop", tuple(at.token_index.values.tolist()),
    )  # fmt: skip


def synthetic_capture(
    n: int = 240,
    n_layers: int = 3,
    hidden: int = 12,
    *,
    positions: tuple[str, ...] = POSITIONS,
    signal: tuple[int, str] | None = (1, "exact_answer_last"),
    strength: float = 1.5,
    wrong_share: float = 0.35,
    seed: int = 0,
) -> xr.Dataset:
    """A Dataset as open_capture(path).dataset() gives it, with massive dimensions and absent tokens.

    signal : the (layer, position) whose activations hold the label; None for noise everywhere.
    """
    rng = np.random.default_rng(seed)
    correct = rng.random(n) > wrong_share
    valid = rng.random(n) > 0.1
    prompt_length = rng.integers(8, 12, n)
    answer_length = rng.integers(1, 7, n)
    total_length = prompt_length + answer_length
    a = prompt_length + rng.integers(0, answer_length)
    b = np.minimum(a + rng.integers(0, 2, n), total_length - 1)
    table = {
        "last_q": prompt_length - 1,
        "first_answer": prompt_length,
        "second_answer": prompt_length + 1,
        "exact_answer_before_first": np.where(valid, a - 1, -1),
        "exact_answer_first": np.where(valid, a, -1),
        "exact_answer_last": np.where(valid, b, -1),
        "exact_answer_after_last": np.where(valid, b + 1, -1),
    }
    table |= {str(-k): total_length - k for k in range(1, 9)}
    token_index = np.stack([table[p] for p in positions]).astype(np.int32)
    token_index[(token_index >= total_length) | (token_index < 0)] = -1
    token = rng.integers(0, 20, (len(positions), n))
    ids = np.zeros((n, int(total_length.max())), np.int32)
    for index, drawn in zip(token_index, token, strict=True):
        ids[np.flatnonzero(index >= 0), index[index >= 0]] = drawn[index >= 0]
    ids[np.arange(n), prompt_length - 1] = 3
    token = np.take_along_axis(ids.T, np.maximum(token_index, 0), axis=0)
    vocabulary = rng.standard_normal((20, hidden))
    embed = vocabulary[token].astype(np.float32)
    out = 3.0 * rng.standard_normal(hidden) + rng.standard_normal((n_layers, len(positions), n, hidden))
    if signal is not None:
        out[signal[0], positions.index(signal[1]), :, 2] += strength * (2 * correct - 1)
    out[..., :2] *= 100.0
    absent = token_index < 0
    out[:, absent] = np.nan
    embed[absent] = np.nan
    answers = np.empty(n, object)
    answers[:] = [[f"country {i % 17}", "alias"] for i in range(n)]
    token_ids = np.empty(n, object)
    token_ids[:] = [row[:length] for row, length in zip(ids, total_length, strict=True)]
    keys = np.array([f"key{rng.integers(1 << 40):010x}" for _ in range(n)], object)
    text = np.where(valid, "answer", None).astype(object)
    return xr.Dataset(
        {
            "mlp_out": (("layer", "position", "sample", "hidden"), out.astype(np.float32)),
            "embed": (("position", "sample", "hidden"), embed),
            "token_index": (("position", "sample"), token_index),
            "in_answer": (("position", "sample"), token_index >= prompt_length),
            "index": ("sample", np.arange(n)),
            "sample_index": ("sample", np.zeros(n, int)),
            "group": ("sample", np.array([f"city {i}" for i in range(n)], object)),
            "correct": ("sample", correct),
            "exact_answer": ("sample", text),
            "exact_answer_valid": ("sample", valid),
            "answers": ("sample", answers),
            "token_ids": ("sample", token_ids),
            "prompt_length": ("sample", prompt_length),
            "total_length": ("sample", total_length),
        },
        coords={"layer": np.arange(n_layers), "position": list(positions), "sample": keys},
        attrs={"model": "synthetic/model", "task": "synthetic"},
    )
