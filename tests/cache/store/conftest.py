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


def load(name):
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(f"store_tests_{name}", PROCESS.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tmp_path():
    """A folder in memory where there is one: thousands of fsyncs wait for whoever else uses the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hiddenlake-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def s3_server():
    """The module that serves object storage, and the environment by which this process and its children find it."""
    s3 = load("s3")
    with s3.serve() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield s3, environment


@pytest.fixture(scope="session")
def bucket(s3_server):
    """The name of a bucket of a server that lives as long as the tests."""
    s3, environment = s3_server
    return s3.new_bucket(environment["AWS_ENDPOINT_URL"])


@pytest.fixture
def slow_s3(s3_server, monkeypatch):
    """A proxy before the server, through which this process goes."""
    with load("proxy").proxy(s3_server[1]["AWS_ENDPOINT_URL"]) as (state, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield state


@pytest.fixture(scope="session")
def process():
    """Path of the writer process's script."""
    return PROCESS


@pytest.fixture(scope="session")
def tiny():
    """The module that makes small captures, and says what must be in them."""
    return load("process")


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
