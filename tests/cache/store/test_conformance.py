"""The public conformance tests, run for the backends that the store has."""

import uuid

import pytest

from hiddenlake.cache.store import objects
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.objects import ObjectBackend
from hiddenlake.cache.testing import BackendTests, CaptureTests


class TestLocal(BackendTests, CaptureTests):
    @pytest.fixture
    def new_backend(self, tmp_path):
        return lambda: LocalBackend(tmp_path / uuid.uuid4().hex)


@pytest.mark.slow
class TestS3(BackendTests, CaptureTests):
    lease_seconds = 20.0

    @pytest.fixture
    def new_backend(self, bucket, monkeypatch):
        # A writer that was killed is found out within the test; living ones are in this process.
        monkeypatch.setattr(objects, "_LEASE_SECONDS", 4.0)
        monkeypatch.setattr(objects, "_BEAT_SECONDS", 0.5)
        return lambda: ObjectBackend(f"s3://{bucket}/lake/{uuid.uuid4().hex}")
