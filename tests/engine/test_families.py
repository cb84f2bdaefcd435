"""Each supported architecture: vLLM's rows equal the transformers engine's, on small random-weight models."""

import pytest

import hiddenlake

from .conftest import SITES, make_task, relative_error, run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = """
import sys
import hiddenlake
sys.path.insert(0, ".")
from conftest import SITES, make_task
hiddenlake.capture(sys.argv[1], make_task(6), out=sys.argv[2], sites=SITES, dtype="float32", max_new_tokens=6)
"""

SHAPE = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_vllm_equals_transformers(family, demo_model_folder, tmp_path):
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SHAPE, dtype="float32")
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(demo_model_folder).save_pretrained(tmp_path / "model")
    done = run_script(SCRIPT, tmp_path / "model", tmp_path / "vllm", env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    assert done.returncode == 0, done.stderr
    hiddenlake.capture(
        str(tmp_path / "model"), make_task(6), out=tmp_path / "hf", sites=SITES, dtype="float32", max_new_tokens=6,
        engine="transformers",
    )  # fmt: skip
    ours, theirs = hiddenlake.open_capture(tmp_path / "vllm"), hiddenlake.open_capture(tmp_path / "hf")
    assert len(ours) == 6 and ours.keys == theirs.keys
    assert ours.samples()["token_ids"].to_pylist() == theirs.samples()["token_ids"].to_pylist()
    for site in (*SITES, "embed"):
        found, expected = (c.read(site, position="last_q") for c in (ours, theirs))
        assert relative_error(found, expected).max() <= 1e-4, site
        found, expected = (c.read(site, position="-1") for c in (ours, theirs))
        assert relative_error(found, expected).max() <= 1e-4, site
