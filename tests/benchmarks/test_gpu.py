"""Benchmarks on a GPU, as far as they go without one: the model that they make, and the memory that they ask for."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from hiddenlake.cache.job import plan_job
from hiddenlake.cache.model import load_model
from hiddenlake.cache.samples import Judgement, Question

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GPU)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from _model import Shape, make_model

    shape = Shape("tiny", 2, 256, 512, 2, 1, 1000)
    return shape, make_model(tmp_path_factory.mktemp("gpu") / "model", shape, weights=True)


def test_a_word_is_a_token(tiny):
    from _model import prompts

    shape, folder = tiny
    model = load_model(folder)
    assert (model.n_layers, model.dtype, model.end_ids) == (2, "bfloat16", (999,))
    [first, second] = prompts(shape, 3, 2, 12)
    assert first != second and prompts(shape, 4, 1, 12) != [first]
    assert list(model.encode(first)[1]) == [int(word[1:]) for word in first.split()]
    assert model.decode_answer([5, 7]) == "w5 w7"


def test_a_token_decides_the_next_by_far(tiny):
    """Or rounding would change answers, and rows with graphs could not be compared with those without."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny[1], dtype=torch.float32).eval()
    ids = torch.randint(0, 900, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        best = model(ids).logits[0].topk(2, -1).values
    assert float((best[:, 0] - best[:, 1]).min()) > 0.2


def test_the_ring_is_as_large_as_the_engine_asks(tiny):
    from _bench import BATCH, Capture, Size
    from _model import prompts

    shape, folder = tiny
    size = Size(prompt_tokens=12, new_tokens=20, rounds=1)
    for positions in (("paper",), ("all",)):
        capture = Capture("", ("mlp_out", "attn_z"), positions, waiting=1.5, batches=1)
        task = _Task([Question(0, prompts(shape, 0, 1, size.prompt_tokens)[0], ())])
        request = plan_job(
            folder, task, sites=capture.sites, positions=positions, max_new_tokens=size.new_tokens
        ).request
        assert (
            capture.ring_bytes(shape, size) == int(1.5 * BATCH) * request.rows(size.prompt_tokens) * request.row_bytes
        )


class _Task:
    name = rules = "none 1"

    def __init__(self, questions):
        self.questions = questions

    def judge(self, question, answer):
        return Judgement(None, None)


def test_relative_errors_tell_another_token(tiny):
    """The check's tolerance lies between rounding and another token's row."""
    import torch
    from _check import _WORST
    from transformers import AutoModelForCausalLM

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tiny[1], dtype=dtype).eval()
        kept = found[dtype] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
            layer.mlp.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        ids = torch.randint(0, 900, (1, 40), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            model.model(ids)
    for exact, rounded in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        exact, rounded = (
            (x[0] if isinstance(x, tuple) else x).float().reshape(-1, 256).numpy() for x in (exact, rounded)
        )
        norm = np.linalg.norm(exact, axis=-1)
        assert (np.linalg.norm(rounded - exact, axis=-1) / norm).max() < _WORST / 2
        assert (np.linalg.norm(np.roll(exact, 1, 0) - exact, axis=-1) / norm).min() > 2 * _WORST
