"""torch.compile: a compiled model's rows are right at every site, and no graph is used again where other taps are meant."""

import pytest

from hiddenlake.cache.engines.vllm_config import configure
from hiddenlake.cache.families import FAMILIES
from hiddenlake.cache.job import plan_job

from .captures import CHUNKED, TOLERANCE, capture_all, running, worst_errors
from .conftest import make_task
from .small_models import Reference, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ALL = FAMILIES["LlamaForCausalLM"].sites[1:]


@pytest.fixture(scope="module")
def llama(demo_model_folder, module_path):
    folder = module_path / "llama"
    make_model("llama", folder, demo_model_folder)
    return folder


def plan(model, sites, layers="all"):
    return plan_job(
        model, make_task(4), sites=sites, layers=layers, positions=["0", "7", "last_q", "-1", "mean_all"], dtype="float32",
        max_new_tokens=6, options={**CHUNKED, "enforce_eager": False},
    )  # fmt: skip


def test_rows_are_right_with_each_engines_own_taps(llama, tmp_path, monkeypatch):
    """Two engines in one process, whose compiled graphs lie in one folder: the second has taps that the first had not."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    reference = Reference("llama", llama)
    for sites in (("mlp_out",), ALL):
        job = plan(llama, sites)
        with running(job) as engine:
            assert not engine.provenance["enforce_eager"]
            capture, _ = capture_all(job, engine, tmp_path / f"{len(sites)}")
        worst = worst_errors(capture, reference)
        print(f"\n{len(sites)} sites, compiled: worst relative L2 error by site {worst}")
        assert worst.keys() == {*sites, "embed"} and max(worst.values()) <= TOLERANCE
    # vLLM names the folders of its artifacts by what decides the graph
    assert len([*(tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile").iterdir()]) == 2


def test_the_key_of_compiled_graphs_names_the_taps(llama):
    """On a CPU, vLLM 0.32 fails to load the artifacts that it saves, and compiles again: so the key itself is looked at."""

    def key(*arguments):
        return configure(plan(llama, *arguments).request)[0].compute_hash()

    assert key(("mlp_out",)) == key(("mlp_out",))
    assert (
        len({key(("mlp_out",)), key(("resid_post",)), key(("mlp_out", "resid_post")), key(("mlp_out",), [0, 2])}) == 4
    )
