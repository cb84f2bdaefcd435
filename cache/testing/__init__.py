"""Conformance tests: what every backend of the store must do. They need NumPy, pytest and this package.

Whoever writes a backend gives them a fixture, and pytest runs them:

    from hiddenlake.cache.testing import BackendTests, CaptureTests

    class TestMyBackend(BackendTests, CaptureTests):
        @pytest.fixture
        def new_backend(self):
            return lambda: MyBackend(f"my://bucket/{uuid.uuid4()}")  # another empty place at each call

The class of the backend must be importable, for other processes open it too, and how long a dead writer may be taken
for alive is said by `lease_seconds`.
"""

import pytest

# Before they are imported: so that a failing assert shows what it compared.
pytest.register_assert_rewrite(
    *(f"hiddenlake.cache.testing.{name}" for name in ("backends", "captures", "conformance", "files", "processes"))
)

from hiddenlake.cache.testing.backends import BackendTests  # noqa: E402
from hiddenlake.cache.testing.captures import CaptureTests  # noqa: E402

__all__ = ["BackendTests", "CaptureTests"]
