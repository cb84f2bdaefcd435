"""LoRA: rows of an adapted model equal Hugging Face's with the adapter merged into its weights, in every family."""

import json
from dataclasses import replace
from functools import cache
from itertools import cycle

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import hiddenlake
from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.engines.adapter import check_adapter
from hiddenlake.cache.engines.vllm_setup import check_config
from hiddenlake.cache.errors import BadInputError, CaptureError, UnknownNameError
from hiddenlake.cache.families import FAMILIES
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.model import load_model
from hiddenlake.cache.positions import PAPER

from .adapters import make_adapter
from .captures import CHUNKED, TOLERANCE, capture_all, running, worst_errors
from .conftest import make_task
from .small_models import MODELS, Reference, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ADAPTED = [family.name for family in FAMILIES.values() if family.adapted]
SITES = ("attn_z", "attn_out", "mlp_act", "mlp_out", "resid_mid", "resid_post", "final_norm")
SETTINGS = {"sites": SITES, "positions": [*PAPER, "0", "-50", "mean_all"], "dtype": "float32", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def folders(demo_model_folder, module_path):
    """A function from a family to its model's folder.

    vLLM adds zeros to the embedding of every token, which makes 0.0 of the -0.0 in these.
    """

    @cache
    def folder(family):
        make_model(family, module_path / family, demo_model_folder)
        file = module_path / family / "model.safetensors"
        tensors = load_file(file)
        next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)[:, ::7] = -0.0
        save_file(tensors, file, metadata={"format": "pt"})
        return module_path / family

    return folder


@pytest.fixture(scope="module")
def llama(folders):
    return folders("llama")


@pytest.fixture(scope="module")
def source(llama):
    return load_model(llama)


@pytest.mark.parametrize(("family", "rank"), [*zip(ADAPTED, cycle((6, 20)))])
def test_rows_equal_hugging_face_with_the_adapter_merged(family, rank, folders, tmp_path):
    model = folders(family)
    merged = make_adapter(tmp_path / "a", model, rank, seed=rank)
    job = plan_job(model, make_task(5), **SETTINGS, lora=tmp_path / "a", options=CHUNKED)
    with running(job) as engine:
        capture, _ = capture_all(job, engine, tmp_path / "x")
    reference = Reference(family, model)
    least = least_differences(capture, reference)
    reference.replace(merged)
    worst = worst_errors(capture, reference)
    print(
        f"\n{family}, rank {rank}: worst relative L2 error by site {worst}; least difference to the base model's {least}"
    )
    assert max(worst.values()) <= TOLERANCE
    assert min(least.values()) >= 0.1


def least_differences(capture, base):
    """Smallest relative L2 distance of any cell of a site from the model's without an adapter, where tokens are the same."""
    least = {}
    for i, sample in enumerate(capture.samples().to_pylist()):
        expected = base(sample["token_ids"])
        for site in capture.coverage.sites:
            found = capture.read(site, samples=i)
            for p, token in enumerate(sample["token_index"]):
                if token >= 0:
                    cell = expected[site][..., token, :]
                    distance = np.linalg.norm(found[..., p, :] - cell, axis=-1) / np.linalg.norm(cell, axis=-1)
                    least[site] = min(least.get(site, np.inf), float(distance.min()))
    return least


def test_the_adapter_is_part_of_the_identity(llama, tmp_path):
    make_adapter(tmp_path / "a", llama, rank=4)
    make_adapter(tmp_path / "b", llama, rank=4, seed=2)
    (tmp_path / "c").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "c" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    change(tmp_path / "c", lora_alpha=3)  # another factor of the same weights
    jobs = [plan_job(llama, make_task(2), lora=lora) for lora in (None, *(tmp_path / name for name in "abc"))]
    assert jobs[0].identity.lora is None
    assert len({job.identity.lora for job in jobs}) == len({job.prompts[0].key for job in jobs}) == 4


def change(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"r": 1}, 8), ({"r": 8}, 8), ({"r": 9}, 16), ({"r": 257}, 320), ({"r": 512}, 512), ({"r": 4, "rank_pattern": {"q_proj": 33}}, 64)],
)  # fmt: skip
def test_ranks_are_rounded_up_to_what_vllm_offers(settings, rank, llama, source, tmp_path):
    make_adapter(tmp_path / "a", llama, rank=1)
    change(tmp_path / "a", **settings)
    assert check_adapter(str(tmp_path / "a"), source) == rank


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.[01]\..*_proj"},
        {"target_modules": ["q_proj", "head"]},  # not the end of a path: of no module
        {"modules_to_save": []},
    ],
)
def test_adapters_of_the_blocks_are_let_in(settings, llama, source, tmp_path):
    make_adapter(tmp_path / "a", llama)
    change(tmp_path / "a", **settings)
    assert check_adapter(str(tmp_path / "a"), source) == 8


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes model.embed_tokens, but rows are checked"),
        ({"target_modules": ["lm_head", "model.embed_tokens"]}, "changes model.embed_tokens, lm_head, but"),
        ({"target_modules": r"(.*\.)?(q_proj|lm_head)"}, "changes lm_head, but"),
        ({"target_modules": r"model\.(layers\..*|embed.*)"}, "changes model.embed_tokens, but"),
        ({"modules_to_save": ["lm_head"]}, "changes lm_head, but"),
        ({"modules_to_save": ["embed_tokens"]}, "changes embed_tokens, but"),
        ({"r": 513}, "has rank 513, vLLM serves up to 512"),
        ({"r": "many"}, "expected the folder of a PEFT LoRA adapter"),
        ({"peft_type": "LOHA"}, "is of the type LOHA, expected LORA"),
    ],
)
def test_adapters_that_cannot_be_captured_are_refused(settings, sentence, llama, tmp_path):
    make_adapter(tmp_path / "a", llama)
    change(tmp_path / "a", **settings)
    job = plan_job(llama, make_task(2), lora=tmp_path / "a")
    with pytest.raises(BadInputError, match=sentence):
        start_engine("vllm", job.request, job.prompts[0].token_ids)


def test_what_is_no_adapter_is_refused(llama, source, tmp_path):
    with pytest.raises(BadInputError, match="is no folder: expected one with adapter_config.json"):
        plan_job(llama, make_task(2), lora=tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="adapter_config.json could not be read"):
        check_adapter(str(llama), source)


@pytest.mark.parametrize("family", sorted(MODELS.keys() - ADAPTED))
def test_families_without_tested_adapters_are_refused(family, source):
    other = next(other for other in FAMILIES.values() if other.name == family)
    with pytest.raises(UnknownNameError, match=f"adapters on the family {family} were not tested"):
        check_adapter("", replace(source, family=other))


def test_the_transformers_engine_refuses_adapters(llama, tmp_path):
    make_adapter(tmp_path / "a", llama)
    job = plan_job(llama, make_task(2), lora=tmp_path / "a")
    with pytest.raises(CaptureError, match="the transformers engine loads no LoRA adapters"):
        start_engine("transformers", job.request, job.prompts[0].token_ids)


@pytest.mark.parametrize(
    ("options", "settings"), [({"lora_target_modules": ["q_proj"]}, {}), ({}, {"quantization": "fp8"})], ids=str
)
def test_engine_arguments_that_would_change_the_weights_refuse(options, settings, llama):
    job = plan_job(llama, make_task(2), options=options | settings)
    with pytest.raises(BadInputError, match="is set by hiddenlake"):
        start_engine("vllm", job.request, job.prompts[0].token_ids)


def test_weights_that_vllm_passes_over_refuse(llama, tmp_path):
    """vLLM loads such an adapter, and answers as the base model where it had a layer of that name."""
    make_adapter(tmp_path / "a", llama)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name.replace(".layers.2.", ".layers.7."): tensor for name, tensor in load_file(file).items()}, file)
    job = plan_job(llama, make_task(2), lora=tmp_path / "a", options=CHUNKED)
    with pytest.raises(
        CaptureError, match=r"no place for 7 of the adapter's weights \(first: model.layers.7.mlp.down_proj"
    ):
        running(job).__enter__()


def test_adapters_that_vllm_does_not_take_refuse(llama, tmp_path):
    make_adapter(tmp_path / "a", llama)
    change(tmp_path / "a", use_dora=True)
    job = plan_job(llama, make_task(2), lora=tmp_path / "a", options=CHUNKED)
    with pytest.raises(CaptureError, match="vLLM cannot load the adapter .*: vLLM does not yet support DoRA"):
        running(job).__enter__()


def test_adapters_beside_captured_requests_refuse(llama):
    from vllm import EngineArgs

    config = EngineArgs(
        **hiddenlake.taps(llama, dtype="float32"), enable_lora=True, max_lora_rank=8
    ).create_engine_config()
    with pytest.raises(CaptureError, match="enable_lora was not tested beside captured requests"):
        check_config(config)
