"""The soak's comparison finds what is right, and every kind of wrong."""

import random

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import soak
from _cells import compare
from _model import make_model
from _reference import Rows

import hiddenlake
from hiddenlake.cache.model import load_model
from hiddenlake.cache.positions import PAPER, POOLS

N = 12


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """(capture, model, reference)"""
    folder = tmp_path_factory.mktemp("cells")
    model = make_model(folder / "model", soak.SMALL, weights=True, ends=range(0, 2000, 8))
    task = soak.make_task(soak.STOPS, N, random.Random(0))
    hiddenlake.capture(
        str(model), task, out=folder / "x", engine="transformers", sites=("attn_z", "mlp_out", "final_norm"),
        positions=(*PAPER, "3", *POOLS, "all/2"), dtype="float32", max_new_tokens=12,
    )  # fmt: skip
    return hiddenlake.open_capture(folder / "x"), load_model(model, "float32"), Rows(model)


def test_right_cells_pass(captured):
    capture, model, reference = captured
    found = compare(capture, model, reference, capture.keys)
    assert (found.samples, found.wrong, found.answers, found.causes) == (N, 0, 0, [])
    absent = sum(sample["token_index"].count(-1) for sample in capture.samples().to_pylist())
    tokens = sum(-(-sample["total_length"] // 2) for sample in capture.samples().to_pylist())
    rows = 2 * 3 + 1 + 1  # of sites and layers, and of embed
    assert absent and found.absent == rows * absent
    assert found.rows == rows * (N * len(capture.coverage.positions) - absent + tokens)
    assert 0 < found.worst < 1e-5


@pytest.mark.parametrize("site", ["attn_z", "mlp_out", "final_norm", "embed"])
def test_a_site_of_another_token_is_wrong(site, captured):
    capture, model, reference = captured
    found = compare(
        capture, model, lambda ids: (rows := reference(ids)) | {site: np.roll(rows[site], 1, -2)}, capture.keys
    )
    assert found.wrong > found.rows / 20 and found.worst > 0.1 and site in found.causes[0]


def test_one_wrong_row_is_counted(captured):
    capture, model, reference = captured
    sample = capture.samples().to_pylist()[3]

    def wrong(ids):
        rows = reference(ids)
        rows["mlp_out"][1, sample["prompt_length"] - 1] *= 1.001
        return rows

    found = compare(capture, model, wrong, [sample["key"]])
    assert found.wrong >= 1 and all("mlp_out" in cause for cause in found.causes)


def test_an_answer_that_is_not_the_models_is_wrong(captured):
    capture, model, reference = captured
    better = compare(
        capture, model, lambda ids: (rows := reference(ids)) | {"logits": np.roll(rows["logits"], 1, -1)}, capture.keys
    )
    assert better.answers == N and "not the model's" in better.causes[0]
    flatter = compare(
        capture, model, lambda ids: (rows := reference(ids)) | {"logits": 0.9 * rows["logits"]}, capture.keys
    )
    assert flatter.answers == N and "log-probabilities" in flatter.causes[0]
    assert better.wrong == flatter.wrong == 0
