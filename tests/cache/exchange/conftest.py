import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

from hiddenlake.cache.store import open_capture

PROCESS = Path(__file__).parents[1] / "store" / "process.py"

IDENTITY = {
    "model": "tiny", "weights": "sha256:0", "quantization": None, "lora": None, "compute_dtype": "bfloat16",
    "chat_template": None, "task": "dumps",
}  # fmt: skip


@pytest.fixture
def tmp_path():
    """A folder in memory where there is one: thousands of fsyncs wait for whoever else uses the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hiddenlake-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def process():
    """Path of the script that writes small captures."""
    return PROCESS


@pytest.fixture(scope="session")
def tiny():
    """The module that makes small captures, and says what must be in them."""
    spec = importlib.util.spec_from_file_location("tiny_capture", PROCESS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_capture"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def identity():
    return IDENTITY


@pytest.fixture(scope="session")
def captures(tiny, tmp_path_factory):
    """(kind, dtype) -> an open capture of 23 samples, written once."""
    made = {}

    def make(kind="both", dtype="bfloat16"):
        if (kind, dtype) not in made:
            path = tmp_path_factory.mktemp("captures") / "lake"
            tiny.write(path, 23, dtype=dtype, coverage=tiny.coverage(dtype, **tiny.KINDS[kind]))
            made[kind, dtype] = open_capture(path)
        return made[kind, dtype]

    return make
