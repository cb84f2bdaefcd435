"""Quantised checkpoints: rows equal Hugging Face's with the weights that the checkpoint stands for."""

import json
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.errors import BadInputError, CaptureError, UnknownNameError
from hiddenlake.cache.families import FAMILIES
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.model import load_model
from hiddenlake.cache.quantization import SCHEMES

from .adapters import make_adapter
from .captures import CHUNKED, capture_all, running
from .conftest import ListTask, make_task, relative_error
from .quantized_models import KINDS, quantize, rounded
from .small_models import MODELS, Reference, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILY = {family.name: family for family in FAMILIES.values()}

# Every family once, and every kind of quantisation.
CASES = {
    "llama": "W8A8", "mistral": "W4A16 asymmetric", "qwen2": "W8A8", "qwen3": "W4A16", "phi3": "GPTQ", "gemma2": "AWQ",
    "gemma3": "W4A16 channel", "opt": "GPTQ",
}  # fmt: skip

# Largest relative L2 error of a row: one and a half of what was seen. vLLM computes in bfloat16, the reference in float32
# with the same weights. Where activations are rounded to 8 bits, their last bit in bfloat16 may decide how.
TOLERANCE = {kind: 0.15 if kind == "W8A8" else 0.06 for kind in KINDS}

# What the value identity calls them.
NAMES = {
    "W8A8": "compressed-tensors W8A8", "W4A16": "compressed-tensors W4A16", "W4A16 channel": "compressed-tensors W4A16",
    "W4A16 asymmetric": "compressed-tensors W4A16", "AWQ": "AWQ W4A16", "GPTQ": "GPTQ W4A16",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(demo_model_folder, module_path):
    """A function from a family to (its model's folder, the quantised one, the weights that are meant there)."""

    @cache
    def folder(family):
        make_model(family, module_path / family, demo_model_folder)
        quantized = module_path / f"{family}-quantized"
        return module_path / family, quantized, quantize(CASES[family], module_path / family, quantized)

    return folder


@pytest.fixture(scope="module")
def llama(folders):
    return folders("llama")[1]


@pytest.mark.parametrize("family", CASES)
def test_rows_equal_hugging_face_with_the_weights_that_are_meant(family, folders, tmp_path):
    kind, (model, quantized, weights) = CASES[family], folders(family)
    short = ListTask([question for question in make_task(16).questions if len(question.question) < 200])
    job = plan_job(quantized, short, sites=FAMILY[family].sites[1:], positions="all", max_new_tokens=6, options=CHUNKED)
    assert job.identity.quantization == NAMES[kind]
    with running(job) as engine:
        capture, _ = capture_all(job, engine, tmp_path / "x")
    reference = Reference(family, model)
    plain, _ = compare(capture, reference)
    reference.replace(weights)
    if kind == "W8A8":
        reference.round_inputs(rounded)
    errors, nearness = compare(capture, reference)
    print(
        f"\n{family}, {kind}: worst relative L2 error {highest(errors)}; worst ratio of distances to the own and to the nearest "
        f"other token's row {highest(nearness)}; median error against the model before it was quantised "
        f"{ {site: round(float(np.median(values)), 3) for site, values in plain.items()} }"
    )
    assert errors.keys() == set(FAMILY[family].sites)
    for site in set(errors) - {"embed"}:
        assert errors[site].max() <= min(TOLERANCE[kind], np.median(plain[site]) / 2)
        # even the least of the distances to another token's row is twice that to the right one
        assert nearness[site].max() <= 0.5
    assert errors["embed"].max() <= 1 / 256


def compare(capture, reference):
    """Of each stored row, by site: (its relative L2 error, the ratio of its distance to what it must be and to the nearest
    row that the reference has for another token of the sample)."""
    errors, nearness = defaultdict(list), defaultdict(list)
    for i, sample in enumerate(capture.samples().to_pylist()):
        ids = np.array(sample["token_ids"])
        expected = reference(sample["token_ids"])
        for site in capture.coverage.widths:
            found = capture.read_tokens(site, samples=i, dtype="float32").values
            assert found.shape == expected[site].shape
            errors[site].append(relative_error(found, expected[site]).ravel())
            for rows, right in zip(
                *(values.reshape(-1, *values.shape[-2:]) for values in (found, expected[site])), strict=True
            ):
                distance = np.linalg.norm(rows[:, None] - right, axis=-1)
                nearness[site].append(distance.diagonal() / np.where(ids[:, None] != ids, distance, np.inf).min(1))
    return tuple({site: np.concatenate(values) for site, values in by_site.items()} for by_site in (errors, nearness))


def highest(by_site):
    return {site: round(float(values.max()), 4) for site, values in by_site.items()}


def test_every_kind_and_every_family_is_tested():
    assert set(CASES.values()) == KINDS.keys() == NAMES.keys()
    assert set(NAMES.values()) == SCHEMES.keys()
    assert CASES.keys() == {family.name for family in FAMILIES.values() if family.adapted}


def test_only_bfloat16_is_let_in(llama):
    with pytest.raises(BadInputError, match="quantised weights were not tested with float32: pass --dtype bfloat16"):
        load_model(llama, "float32")


@pytest.mark.parametrize("family", sorted(MODELS.keys() - CASES))
def test_families_that_were_not_tested_are_refused(family, demo_model_folder, tmp_path):
    make_model(family, tmp_path / "x", demo_model_folder)
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": KINDS["AWQ"][1]}))
    with pytest.raises(UnknownNameError, match=f"not tested in the family {family}"):
        load_model(tmp_path / "x", "bfloat16")


def test_the_reference_engine_and_adapters_refuse(llama, folders, tmp_path):
    job = plan_job(llama, make_task(2))
    with pytest.raises(CaptureError, match="the transformers engine was not tested with quantised weights"):
        start_engine("transformers", job.request, job.prompts[0].token_ids)
    make_adapter(tmp_path / "a", folders("llama")[0])
    job = plan_job(llama, make_task(2), lora=tmp_path / "a")
    with pytest.raises(UnknownNameError, match="LoRA adapters on quantised weights were not tested"):
        start_engine("vllm", job.request, job.prompts[0].token_ids)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM rounds activations on CPUs with AMX only")
def test_rounded_activations_refuse_where_weights_alone_are_quantised(folders, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    job = plan_job(folders("qwen3")[1], make_task(2), max_new_tokens=4, options=CHUNKED)
    with pytest.raises(CaptureError, match="vLLM rounds the activations of this model to 8 bits"):
        running(job).__enter__()
