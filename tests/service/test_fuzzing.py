"""Whatever is stored, or sent, is read or refused in words: fuzzing that is led by coverage, in processes of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzzing.py")


@pytest.mark.slow
@pytest.mark.parametrize("target, runs", [("root", 3000), ("commit", 3000), ("claim", 1000), ("requests", 10_000)])
def test_nothing_ends_in_an_error_that_nobody_expected(target, runs, lake, tmp_path):
    pytest.importorskip("atheris")
    options = [
        f"-atheris_runs={runs}", "-seed=1", "-max_len=16384", "-reduce_inputs=0", "-timeout=60", f"-artifact_prefix={tmp_path}/",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, str(lake), *options],
        capture_output=True, text=True, errors="replace", timeout=600, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    assert f"Done {runs} in" in done.stderr
    found = [int(edges) for edges in re.findall(r" cov: (\d+) ", done.stderr)]
    assert found[-1] > found[0] > 100, "nothing led it"
