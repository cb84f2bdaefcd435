"""An imported dump is what a capture of the same tokens is: layer ids, embed and tokens mean the same in both."""

import json

import numpy as np
import pytest

from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.vllm_dumps import VllmDumps
from hiddenlake.cache.store import open_capture


@pytest.mark.slow
@pytest.mark.parametrize("layer_ids", [(0, 1, 2, 3), (2, 3)])
def test_a_dump_equals_a_capture(tiny_model, tmp_path, identity, layer_ids):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    import hiddenlake

    rows = [{"prompt": f"Say {word}.", "answer": f" {word}, twice."} for word in ("one", "two", "three")]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"sites": ["resid_post"], "positions": "all", "engine": "transformers", "dtype": "float32"}
    hiddenlake.capture(str(tiny_model), str(tmp_path / "given.jsonl"), out=tmp_path / "captured", **settings)
    captured = open_capture(tmp_path / "captured")
    samples = captured.samples().to_pylist()

    # as vLLM dumps it: the stream after so many blocks, the last one too before the norm
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    last = []
    model.model.layers[-1].register_forward_hook(lambda module, given, found: last.append(found))
    (tmp_path / "dumps").mkdir()
    for sample in samples:
        with torch.no_grad():
            found = model(torch.tensor([sample["token_ids"]]), output_hidden_states=True)
        streams = [*found.hidden_states[:-1], last[-1][0] if isinstance(last[-1], tuple) else last[-1]]
        states = torch.stack([streams[k][0] for k in layer_ids], dim=1)
        ids = torch.tensor(sample["token_ids"])
        save_file({"hidden_states": states, "token_ids": ids}, tmp_path / "dumps" / f"{sample['key']}.safetensors")
    lines = [
        {"request_id": s["key"], "index": s["index"], "prompt_length": s["prompt_length"], "prompt": s["prompt"]}
        for s in samples
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = VllmDumps(tmp_path / "dumps", layer_ids, "float32", samples=tmp_path / "requests.jsonl", model=tiny_model)
    done = import_source(source, tmp_path / "imported", identity | {"compute_dtype": "float32"})
    assert (done.imported, done.failed) == (3, 0)
    imported = open_capture(tmp_path / "imported")
    assert imported.keys == captured.keys
    same = captured.read_tokens("embed").values
    assert np.array_equal(imported.read_tokens("embed").values, same)
    assert imported.coverage.layers == tuple(k - 1 for k in layer_ids if k)
    for layer in imported.coverage.layers:
        ours, theirs = captured.read_tokens("resid_post", layer), imported.read_tokens("resid_post", layer)
        assert np.array_equal(ours.offsets, theirs.offsets) and np.array_equal(ours.token_index, theirs.token_index)
        np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-4, atol=1e-5)
        for other in set(captured.coverage.layers) - {layer}:
            assert not np.allclose(theirs.values, captured.read_tokens("resid_post", other).values, atol=1e-2)
