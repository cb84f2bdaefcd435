"""What all conformance tests share: where they find the backend that is to be tested."""

import time
from collections.abc import Callable

import pytest

from hiddenlake.cache.store.backend import Backend

# Some of each kind that a capture has.
FOLDERS = ("samples", "labels", "failures", "claims", "commits", "writers", "mlp_out", "row_crc/tokens/mlp_out")

ROOT = b'{"zarr_format": 3}'


class Conformance:
    """lease_seconds : after so long at the latest, `lives` is False of a writer whose process has died."""

    lease_seconds = 0.0

    @pytest.fixture
    def new_backend(self) -> Callable[[], Backend]:
        """Returns a backend of a place where nothing is, another one at each call."""
        raise NotImplementedError(
            f"{type(self).__name__} has no fixture `new_backend`: give it one, as hiddenlake.cache.testing says"
        )

    @pytest.fixture
    def empty(self, new_backend: Callable[[], Backend]) -> Backend:
        return new_backend()

    @pytest.fixture
    def place(self, empty: Backend) -> Backend:
        """A capture in which nothing is but its root."""
        assert empty.make({"zarr.json": ROOT}, FOLDERS)
        return empty

    def wait_until_dead(self, place: Backend, writer: str) -> None:
        """Until the backend knows that a writer's process has died."""
        end = time.monotonic() + self.lease_seconds
        while True:
            with place.lock():
                if not place.lives(writer):
                    return
            assert time.monotonic() <= end, f"writer {writer} died, and lives {self.lease_seconds} s later"
            time.sleep(0.1)
