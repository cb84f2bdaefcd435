import importlib.util
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from hiddenlake.cache.store import fp8, open_capture
from hiddenlake.cache.store.coverage import DTYPES

PROCESS = Path(__file__).with_name("process.py")


@pytest.fixture
def tmp_path():
    """A folder in memory where there is one: thousands of fsyncs wait for whoever else uses the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hiddenlake-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def process():
    """Path of the writer process's script."""
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
def expected(tiny):
    """site -> bits of samples 0 to n, (layer, position, sample, width) or (position, sample, width)."""

    def expect(samples, coverage):
        every = [tiny.rows(i, coverage) for i in (range(samples) if isinstance(samples, int) else samples)]
        return {site: np.stack([rows[site] for rows in every], axis=-2) for site in every[0]}

    return expect


def stored(bits, capture):
    """What a capture gives back for bits that were written: with a lossy codec, what that makes of each row."""
    bits = np.ascontiguousarray(bits)
    if capture.codec != "fp8":
        return bits
    return fp8_of(bits.tobytes(), bits.shape, capture.coverage.dtype)


@lru_cache(256)
def fp8_of(bits, shape, dtype):
    return fp8.decode(*fp8.encode(np.frombuffer(bits, DTYPES[dtype][1]).reshape(shape)), dtype)


@pytest.fixture(scope="session")
def assert_holds(tiny, expected):
    """Every committed sample of a capture has exactly its bits. Returns the capture."""

    def check(path, complete=None):
        capture = open_capture(path)
        numbers = [int(key.removeprefix("key-")) for key in capture.keys]
        assert numbers == sorted(set(numbers))
        if complete is not None:
            assert numbers == list(range(complete))
        if numbers:
            every = expected(numbers, capture.coverage)
            for site in capture.coverage.widths if capture.coverage.positions else ():
                bits = stored(every[site], capture)
                assert np.array_equal(capture.read(site).view(np.uint8), bits.view(np.uint8))
        if numbers and capture.coverage.tokens:
            every = [tiny.tokens(i, capture.coverage) for i in numbers]
            for site in capture.coverage.widths:
                bits = np.concatenate([tokens[site] for tokens in every], axis=-2)
                found = capture.read_tokens(site)
                assert found.lengths.tolist() == [tokens[site].shape[-2] for tokens in every]
                assert np.array_equal(found.values.view(np.uint8), stored(bits, capture).view(np.uint8))
        return capture

    return check
