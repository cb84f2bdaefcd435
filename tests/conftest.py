"""What every test shares: the demo model's folder, and the rule for tests marked `gpu`."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """The demo model in its usual place, so that it is converted once a machine and not once a run."""
    from hiddenlake.cache.demo_model import demo_model

    return demo_model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu`, with the reason, where there is no CUDA."""
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch  # here, since most runs of a few tests need no torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
