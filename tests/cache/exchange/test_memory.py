"""Memory is a contract: what is said before a transfer is not exceeded, however much is transferred."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hiddenlake.cache.exchange.exporting import FORMATS, export_capture

PEAK = Path(__file__).with_name("peak.py")
MIB = 1 << 20


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, PEAK, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def big():
    """A capture of 300 MB, on disk: memory is what is measured."""
    with tempfile.TemporaryDirectory(prefix="hiddenlake-test-") as folder:
        run("make", Path(folder) / "lake")
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("what", [*FORMATS, "import"])
def test_a_transfer_takes_no_more_memory_than_it_says(big, what):
    out = big / f"out-{what}"
    try:
        source = big / "lake"
        if what == "import":
            source = big / "source"
            export_capture(big / "lake", source)
        # the least that holds one row of a dataset, all layers, is 3 MiB; shards need two buffers of each kind
        found = json.loads(run(what, source, out, 64 * MIB if what == "import" else 24 * MIB))
    finally:
        for path in [*big.glob("out-*"), big / "source"]:
            shutil.rmtree(path, ignore_errors=True)
    assert found["data"] > 250 * MIB
    # what the allocator and the libraries keep on top does not grow with the data
    assert found["peak"] < found["allowed"] + 16 * MIB, found
