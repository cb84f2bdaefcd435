"""Captures in a store of their own, with a signal planted and with texts that a page must not believe."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.writer import open_writer

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)> \"'&</script> {{ 7 * 7 }}"
IDENTITY = {
    "model": f"model {HOSTILE}", "task": "</title><script>alert(2)</script>", "compute_dtype": "float32", "lora": None,
    "decoding": {"max_new_tokens": 8, "sampling": "greedy"},
}  # fmt: skip
PROVENANCE = {"engine": "transformers", "host": HOSTILE}


@pytest.fixture(scope="session")
def store_capture() -> Callable[..., Capture]:
    return stored


def stored(folder: Path, data: xr.Dataset, identity: dict | None = None, **columns: list) -> Capture:
    """A synthetic capture, written. columns : of samples, e.g. correct, in place of the data's."""
    positions = tuple(data.position.values.tolist())
    hidden = data.sizes["hidden"]
    coverage = Coverage(
        ("mlp_out",), tuple(data.layer.values.tolist()), positions, {"embed": hidden, "mlp_out": hidden}, "float32"
    )
    n = data.sizes["sample"]
    values, embed = data.mlp_out.values, data.embed.values
    with open_writer(
        folder, identity=identity or IDENTITY, coverage=coverage, provenance=PROVENANCE, planned=n, shard_samples=64
    ) as writer:
        rows = {str(key): i for i, key in enumerate(data.sample.values)}
        while chosen := writer.reserve(list(rows), 64):
            for key in chosen:
                i = rows[key]
                shard, slot = writer.slot()
                for site, part in (("mlp_out", values[:, :, i]), ("embed", embed[:, i])):
                    view = shard.views[site]
                    view[..., slot, :] = np.where(np.isnan(part), view[..., slot, :], part.view(view.dtype))
                writer.add(shard, slot, sample(data, i, columns))
    return open_capture(folder)


def sample(data: xr.Dataset, i: int, columns: dict[str, list]) -> Sample:
    prompt, total = int(data.prompt_length[i]), int(data.total_length[i])
    valid = bool(data.exact_answer_valid[i])
    fields = {
        "group": str(data.group.values[i]),
        "prompt": f"prompt {i} {HOSTILE}",
        "answer": f"before {i} <b>Exact {i}</b> after {HOSTILE}",
        "answers": (f"gold {i}", HOSTILE),
        "correct": bool(data.correct[i]),
        "exact_answer": f"<b>exact {i}</b>" if valid else None,
    } | {name: values[i] for name, values in columns.items()}
    return Sample(
        key=str(data.sample.values[i]), index=i, sample_index=0, exact_answer_valid=valid, token_ids=tuple(range(total)),
        logprobs=(-0.5,) * (total - prompt), prompt_length=prompt, total_length=total, finish_reason="stop",
        token_index=tuple(data.token_index.values[:, i].tolist()), **fields,
    )  # fmt: skip


@pytest.fixture(scope="session")
def capture(make_capture, tmp_path_factory) -> Capture:
    return stored(tmp_path_factory.mktemp("report") / "made", make_capture(n=300))
