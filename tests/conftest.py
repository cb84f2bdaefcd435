"""What tests share: the demo model's folder, a tiny model, a file's own folder, failures said at once, the rule for `gpu`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, so that a test fails by what was changed; `--hypothesis-profile explore` looks for others.
# How long one takes depends on who else uses the machine.
settings.register_profile("shared", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """The demo model in its usual place, so that it is converted once a machine and not once a run."""
    from hiddenlake.cache.demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def tiny_model(demo_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers x 128 with random weights, a context of 256 tokens, and the demo model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what a file's tests share, removed after them: models and captures of all files would be gigabytes."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What fails is said at once, beside the summary at the end, which a run that is stopped never comes to."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed after {report.duration:.0f} s:\n{report.longreprtext}", flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that none is left over for the end when several run at a time.

    What is marked `gpu` is skipped, with the reason, where there is no CUDA.
    """
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch  # here, since most runs of a few tests need no torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
