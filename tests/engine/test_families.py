"""Each family, on both engines: every site of every token equals what Hugging Face computes, on small random models."""

import json

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.families import FAMILIES
from hiddenlake.cache.sites import SITES

from .conftest import make_task, relative_error
from .scripts import run_script
from .small_models import MODELS, Reference, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILY = {family.name: family for family in FAMILIES.values()}
SETTINGS = {"positions": [str(k) for k in range(128)], "max_new_tokens": 6, "dtype": "float32"}

BFLOAT16 = {f"{family}-bfloat16": family for family in ("gemma3", "gpt2")}
CASES = {family: family for family in MODELS} | BFLOAT16

# vLLM is imported once; each capture has a process of its own. The norms overwrite their inputs, as on CUDA.
SCRIPT = """
import json, os, sys, traceback
sys.path.insert(0, ".")
import hiddenlake
import vllm.v1.worker.cpu_worker
from conftest import make_task

def in_place(native):
    def forward(self, x, residual=None):
        if residual is None:
            return native(self, x)
        normed, summed = native(self, x.clone(), residual.clone())
        overwritten.append(x)
        return x.copy_(normed), residual.copy_(summed)
    return forward

from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
for norm in (RMSNorm, GemmaRMSNorm):
    norm.forward_native = in_place(norm.forward_native)
overwritten = []

for name, case in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        try:
            hiddenlake.capture(task=make_task(4), **case)
            print(name, "IN PLACE" if overwritten else "", flush=True)
        except BaseException:
            print("in", name, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def folders(demo_model_folder, module_path):
    for family in MODELS:
        make_model(family, module_path / family, demo_model_folder)
    return module_path


@pytest.fixture(scope="module")
def references(folders):
    return {family: Reference(family, folders / family) for family in MODELS}


@pytest.fixture(scope="module")
def vllm_lake(folders, module_path):
    """(folder of the captures, what was printed)."""
    lake = module_path / "vllm"
    lake.mkdir()
    jobs = {
        case: SETTINGS
        | {"model": str(folders / family), "out": str(lake / case), "sites": FAMILY[family].sites}
        | ({"dtype": "bfloat16"} if case in BFLOAT16 else {})
        for case, family in CASES.items()
    }
    done = run_script(lake, SCRIPT, json.dumps(jobs), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return lake, done.stdout, done.stderr


@pytest.fixture(scope="module")
def transformers_lake(folders, module_path):
    lake = module_path / "transformers"
    for family in MODELS:
        hiddenlake.capture(
            str(folders / family),
            make_task(4),
            out=lake / family,
            sites=FAMILY[family].sites,
            engine="transformers",
            **SETTINGS,
        )
    return lake, "", ""


@pytest.fixture(params=("vllm", "transformers"))
def lake(request):
    return request.getfixturevalue(f"{request.param}_lake")


def open_case(lake, case):
    folder, _, errors = lake
    assert (folder / case).exists(), errors
    capture = hiddenlake.open_capture(folder / case)
    assert len(capture) == 4, errors
    return capture


def rows(capture):
    """(token ids, {site: (layer, token, width)}) of each sample: every token is a position."""
    stored = {site: capture.read(site) for site in capture.coverage.widths}
    for i, sample in enumerate(capture.samples().to_pylist()):
        n = sample["total_length"]
        assert sample["token_index"][:n] == list(range(n)) and set(sample["token_index"][n:]) <= {-1}
        yield sample["token_ids"], {site: values[..., :n, i, :] for site, values in stored.items()}


def worst_errors(capture, reference):
    """Largest relative L2 error of a row, by site."""
    worst: dict[str, float] = {}
    for ids, found in rows(capture):
        expected = reference(ids)
        assert found.keys() == expected.keys()
        for site, values in found.items():
            worst[site] = max(worst.get(site, 0.0), float(relative_error(values, expected[site]).max()))
    return worst


def test_every_family_is_tested():
    assert MODELS.keys() == FAMILY.keys()


@pytest.mark.parametrize("family", MODELS)
def test_every_site_equals_hugging_face(family, lake, references):
    capture = open_case(lake, family)
    assert set(capture.coverage.widths) == set(SITES) - (set() if "mlp_act" in FAMILY[family].sites else {"mlp_act"})
    worst = worst_errors(capture, references[family])
    print(f"\n{family}: worst relative L2 error {max(worst.values()):.1e} {worst}")
    assert max(worst.values()) <= 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_the_stream_is_the_sum_of_what_is_added_to_it(family, lake):
    assert_sums(open_case(lake, family))


@pytest.mark.parametrize("case", BFLOAT16)
def test_the_sums_are_rounded_once_in_bfloat16(case, vllm_lake):
    """Samples that are there have also passed the check that each row's embed is its token's, bit for bit."""
    assert_sums(open_case(vllm_lake, case))


def assert_sums(capture):
    """Exactly, since the stream that is stored is the one that the model goes on with."""
    for _, found in rows(capture):
        assert np.array_equal(found["resid_mid"], found["resid_pre"] + found["attn_out_post"])
        assert np.array_equal(found["resid_post"], found["resid_mid"] + found["mlp_out_post"])
        assert np.array_equal(found["resid_pre"][1:], found["resid_post"][:-1])
        assert np.array_equal(found["resid_pre"][0], found["embed"])


def test_norms_overwrote_what_the_taps_had_read(vllm_lake):
    """On a CPU vLLM's own norms do not, so that a tap which kept a reference would pass."""
    fused = [family for family in MODELS if FAMILY[family].pairs]
    assert [line.split()[0] for line in vllm_lake[1].splitlines() if line.endswith("IN PLACE")] == [
        *fused,
        "gemma3-bfloat16",
    ]
