"""A model that computes in float16 is stored in float16, pools too, as near to float32 as its rounding allows."""

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.spot_check import TOLERANCE, spot_check

from .conftest import make_task, relative_error

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SITES = ("resid_post", "mlp_out")


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_float16(demo_model_folder, tmp_path, reference, engine):
    summary = hiddenlake.capture(
        str(demo_model_folder),
        make_task(6),
        out=tmp_path / engine,
        sites=SITES,
        positions=("last_q", "first_answer", "mean_prompt", "max_answer", "all"),
        engine=engine,
        dtype="float16",
        max_new_tokens=12,
        ring_bytes=1 << 30,
    )
    assert (summary.committed, summary.failed) == (6, 0)
    capture = hiddenlake.open_capture(tmp_path / engine)
    assert capture.coverage.dtype == "float16" and capture.identity["compute_dtype"] == "float16"
    assert capture.read("mlp_out").dtype == np.float16
    errors = []
    for i, sample in enumerate(capture.samples().to_pylist()):
        expected, q = reference(sample["token_ids"]), sample["prompt_length"]
        tokens = capture.read_tokens("resid_post", samples=i, dtype="float32")
        errors.append(relative_error(tokens.values, expected["resid_post"][:, tokens.token_index]).ravel())
        for site in SITES:
            cells = capture.read(site, samples=i, dtype="float32")
            stream = expected[site]
            wanted = [stream[:, q - 1], stream[:, q], stream[:, :q].mean(1), stream[:, q:].max(1)]
            errors += [relative_error(cells[:, p], rows).ravel() for p, rows in enumerate(wanted)]
    errors = np.concatenate(errors)
    worst, median = TOLERANCE["float16"]
    print(f"\n{engine}: {errors.size} rows, worst {errors.max():.1e}, median {np.median(errors):.1e}")
    assert errors.max() <= worst and np.median(errors) <= median
    assert spot_check(capture, demo_model_folder, 4).ok
