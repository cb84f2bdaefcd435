"""vLLM's own dumps become captures bit for bit; what they do not say must be said, and what lies is refused."""

import fcntl
import json

import numpy as np
import pytest

from hiddenlake.cache.errors import BadInputError, UnknownNameError
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.vllm_dumps import VllmDumps
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.verify import verify

torch = pytest.importorskip("torch")
WIDTH, VOCABULARY, BLOCKS = 24, 50, 8


def table(dtype=torch.bfloat16):
    return torch.from_numpy(np.random.default_rng(7).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)).to(dtype)


def dump(folder, name, ids, layer_ids, dtype=torch.bfloat16):
    """A file as the connector writes it. Returns the states (token, layer id, width)."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    seed = np.random.default_rng([len(ids), sum(ids)])
    states = torch.from_numpy(seed.normal(size=(len(ids), len(layer_ids), WIDTH)).astype(np.float32)).to(dtype)
    if layer_ids[0] == 0:
        states[:, 0] = table(dtype)[ids]
    save_file({"hidden_states": states.contiguous(), "token_ids": torch.tensor(ids)}, folder / f"{name}.safetensors")
    return states.float().numpy()


def model(folder, architecture="LlamaForCausalLM", sharded=False, **config):
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"architectures": [architecture], "num_hidden_layers": BLOCKS} | config
    (folder / "config.json").write_text(json.dumps(config))
    file = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    save_file({"model.embed_tokens.weight": table(), "lm_head.weight": table()}, folder / file)
    if sharded:
        index = {"weight_map": {"model.embed_tokens.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def lines(path, *objects):
    path.write_text("".join(json.dumps(line) + "\n\n" for line in objects))
    return path


def wide(array):
    return array.astype(np.float32)


def test_prompts_of_all_tokens(tmp_path, identity):
    every = {f"req-{i}": dump(tmp_path / "d", f"req-{i}", [1, i, 7 + i], [0, 3, 8]) for i in (2, 10, 1)}
    (tmp_path / "d/req-1.safetensors.lock").touch()  # vLLM leaves them
    source = VllmDumps(tmp_path / "d", [0, 3, 8], "bfloat16", prompts_only=True)
    done = import_source(source, tmp_path / "lake", identity)
    assert (done.imported, done.failed) == (3, 0)
    capture = open_capture(tmp_path / "lake")
    # in the order of the numbers, and layers counted as blocks
    assert capture.keys == ["req-1", "req-2", "req-10"]
    assert capture.coverage.layers == (2, 7) and capture.coverage.sites == ("resid_post",)
    assert capture.coverage.dtype == "bfloat16" and str(capture.coverage.tokens) == "all"
    for key, states in every.items():
        rows = capture.read_tokens("resid_post", None, [key], dtype="float32")
        assert np.array_equal(rows.values, states[:, 1:].swapaxes(0, 1))
        assert np.array_equal(capture.read_tokens("embed", None, [key], dtype="float32").values, states[:, 0])
    row = capture.samples().slice(1, 1).to_pylist()[0]
    assert (row["token_ids"], row["prompt_length"], row["total_length"]) == ([1, 2, 9], 3, 3)
    assert capture.identity == identity | {"stored_dtype": "bfloat16", "imported": "vllm", "position_rules": 1}
    assert capture.provenance["imported"]["layer_ids"] == [0, 3, 8]
    assert verify(tmp_path / "lake").ok


@pytest.mark.parametrize("sharded", [False, True])
def test_embed_is_taken_from_the_model_where_layer_id_0_is_missing(tmp_path, identity, sharded):
    states = dump(tmp_path / "d", "a", [3, 49, 3], [4])
    source = VllmDumps(tmp_path / "d", [4], "bfloat16", prompts_only=True, model=model(tmp_path / "m", sharded=sharded))
    import_source(source, tmp_path / "lake", identity)
    capture = open_capture(tmp_path / "lake")
    assert np.array_equal(capture.read_tokens("embed", dtype="float32").values, table()[[3, 49, 3]].float().numpy())
    assert np.array_equal(capture.read_tokens("resid_post", 3, dtype="float32").values, states[:, 0])


def test_answers_positions_and_pools(tmp_path, identity):
    ids = list(range(5, 15))
    states = dump(tmp_path / "d", "a", ids, [0, 2])
    plain = dump(tmp_path / "d", "b", ids[:6], [0, 2])
    samples = lines(
        tmp_path / "s.jsonl",
        {
            "request_id": "a", "prompt_length": 6, "token_ids": [*ids, 49], "prompt": "p", "answer": "x", "index": 4,
            "correct": True, "exact_answer": "x", "exact_answer_tokens": [7, 8], "logprobs": [-1.0] * 5, "note": "n",
        },
        {"request_id": "b", "prompt_length": 4},
    )  # fmt: skip
    positions = "last_q,exact_answer_last,-1,-2,mean_answer,mean_exact_answer,max_prompt,3,all"
    source = VllmDumps(tmp_path / "d", [0, 2], "bfloat16", samples=samples, positions=positions)
    assert "fields that are not imported: note" in source.note
    done = import_source(source, tmp_path / "lake", identity)
    assert (done.imported, done.failed) == (2, 0)
    capture = open_capture(tmp_path / "lake")
    a = next(row for row in capture.samples().to_pylist() if row["key"] == "a")
    # vLLM never fed the last token: what needs it is absent
    assert a["token_index"] == [5, 8, -1, 9, -1, -2, -2, 3] and a["status"].startswith("the dump lacks the last token")
    assert (a["correct"], a["answer"], a["logprobs"], a["exact_answer_valid"]) == (True, "x", [-1.0] * 5, True)
    rounded = lambda values: torch.from_numpy(values).bfloat16().float().numpy()  # noqa: E731
    for key, stream in (("resid_post", 1), ("embed", 0)):
        layer = 1 if key == "resid_post" else None
        cells = capture.read(key, layer, samples="a", dtype="float32")
        for p, token in enumerate(a["token_index"]):
            if token >= 0:
                assert np.array_equal(cells[p], states[token, stream])
            elif token == -1:
                assert np.isnan(cells[p]).all()
        assert np.array_equal(cells[5], rounded(states[7:9, stream].mean(0)))
        assert np.array_equal(cells[6], states[:6, stream].max(0))
        rows = capture.read_tokens(key, layer, ["a"], dtype="float32")
        assert np.array_equal(rows.values, states[:, stream])
    b = capture.read("resid_post", 1, samples="b", dtype="float32")
    assert np.array_equal(b[capture.coverage.positions.index("mean_answer")], rounded(plain[4:, 1].mean(0)))
    assert np.array_equal(b[2], plain[5, 1])
    assert verify(tmp_path / "lake").ok


def test_every_third_token_of_a_dump_that_is_longer_than_a_block(tmp_path, identity, monkeypatch):
    from hiddenlake.cache.exchange import vllm_dumps

    monkeypatch.setattr(vllm_dumps, "BLOCK_BYTES", 1000)
    states = dump(tmp_path / "d", "a", [i % VOCABULARY for i in range(100)], [0, 1])
    source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True, positions="all/3")
    import_source(source, tmp_path / "lake", identity)
    capture = open_capture(tmp_path / "lake")
    assert np.array_equal(capture.read_tokens("resid_post", 0, dtype="float32").values, states[::3, 1])


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float16, "float16"), (torch.float32, "float32")],
)
def test_other_dtypes_are_stored_exactly(tmp_path, identity, dtype, name):
    states = dump(tmp_path / "d", "a", [1, 2, 3], [0, 1], dtype)
    source = VllmDumps(tmp_path / "d", [0, 1], name, prompts_only=True)
    import_source(source, tmp_path / "lake", identity | {"compute_dtype": name})
    capture = open_capture(tmp_path / "lake")
    # float32 holds every float16, where a capture cannot be float16 itself
    assert capture.coverage.dtype == (name if name in DTYPES else "float32")
    assert np.array_equal(capture.read_tokens("resid_post", 0).values, states[:, 1])


def test_no_value_is_rounded(tmp_path, identity):
    dump(tmp_path / "d", "a", [1, 2, 3], [0, 1], torch.float32)
    exact = dump(tmp_path / "e", "a", [1, 2, 3], [0, 1])
    from safetensors.torch import save_file

    save_file(
        {"hidden_states": torch.from_numpy(exact), "token_ids": torch.tensor([1, 2, 3])}, tmp_path / "e/a.safetensors"
    )
    facts = identity | {"compute_dtype": "float32"}
    source = VllmDumps(tmp_path / "d", [0, 1], "float32", prompts_only=True, dtype="bfloat16")
    done = import_source(source, tmp_path / "rounded", facts)
    assert done.imported == 0 and "are not exact in bfloat16" in done.causes["a"]
    source = VllmDumps(tmp_path / "e", [0, 1], "float32", prompts_only=True, dtype="bfloat16")
    assert import_source(source, tmp_path / "exact", facts).imported == 1


def test_what_is_not_finite_or_not_there_fails_alone(tmp_path, identity):
    from safetensors.torch import load_file, save_file

    for i in range(4):
        dump(tmp_path / "d", f"r{i}", [1, 2 + i], [0, 1])
    broken = load_file(tmp_path / "d/r1.safetensors")
    broken["hidden_states"][1, 1, 5] = float("nan")
    save_file(broken, tmp_path / "d/r1.safetensors")
    samples = lines(tmp_path / "s.jsonl", *({"request_id": f"r{i}", "prompt_length": 2} for i in range(6)))
    for positions in ("all", "last_q"):
        source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", samples=samples, positions=positions)
        done = import_source(source, tmp_path / positions, identity, shard_samples=2)
        assert (done.imported, done.failed) == (3, 3)
        assert "finite" in done.causes["r1"] and "has no dump of it" in done.causes["r5"]
        capture = open_capture(tmp_path / positions)
        assert capture.keys == ["r0", "r2", "r3"] and capture.planned == 6
        assert capture.failures()["key"].to_pylist() == ["r1", "r4", "r5"]
        assert verify(tmp_path / positions).ok


def test_rows_that_are_not_of_their_tokens_are_found_where_the_model_is_named(tmp_path, identity):
    from safetensors.torch import load_file, save_file

    dump(tmp_path / "d", "good", [1, 2, 3], [0, 1])
    dump(tmp_path / "d", "shifted", [4, 5, 6], [0, 1])
    shifted = load_file(tmp_path / "d/shifted.safetensors")
    save_file(shifted | {"hidden_states": shifted["hidden_states"].roll(1, 0)}, tmp_path / "d/shifted.safetensors")
    dump(tmp_path / "d", "unknown", [1, 2, 3], [0, 1])
    unknown = load_file(tmp_path / "d/unknown.safetensors")
    save_file(unknown | {"token_ids": torch.tensor([1, 2, VOCABULARY])}, tmp_path / "d/unknown.safetensors")
    source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True, model=model(tmp_path / "m"))
    done = import_source(source, tmp_path / "lake", identity)
    assert done.imported == 1
    assert "token 0 is not the embedding of its id 4" in done.causes["shifted"]
    assert f"token id {VOCABULARY}" in done.causes["unknown"]


REFUSED = {
    "descending ids": ({"layer_ids": [3, 0]}, "ascending as in its files"),
    "an id twice": ({"layer_ids": [0, 0]}, "each once"),
    "no ids": ({"layer_ids": []}, "expected vLLM's ids"),
    "embed alone": ({"layer_ids": [0]}, "one from 1 on"),
    "ids of another number": ({"layer_ids": [0, 1, 2]}, "has 2 layers, but 3 layer ids"),
    "no embed": ({"layer_ids": [1, 2]}, "no embed .id 0.*: name the model's folder"),
    "no word on prompts": ({"prompts_only": False}, "does not say where its prompt ends"),
    "another dtype": ({"compute_dtype": "float32"}, "is bfloat16, but .* given as float32"),
    "a dtype that is not stored": ({"dtype": "float64"}, "cannot be stored"),
    "no such folder": ({"folder": "nowhere"}, "is no folder"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, changed, message):
    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    arguments = {"layer_ids": [0, 1], "compute_dtype": "bfloat16", "prompts_only": True} | changed
    folder = tmp_path / arguments.pop("folder", "d")
    with pytest.raises(BadInputError, match=message):
        VllmDumps(folder, arguments.pop("layer_ids"), arguments.pop("compute_dtype"), **arguments)


TENSORS = {
    "no ids": ({"hidden_states": torch.zeros(2, 2, 4)}, "no tensor 'token_ids'"),
    "fewer ids": ({"hidden_states": torch.zeros(3, 2, 4), "token_ids": torch.arange(2)}, "expected .token, layer id"),
    "flat": ({"hidden_states": torch.zeros(3, 8), "token_ids": torch.arange(3)}, "expected .token, layer id"),
    "no tokens": ({"hidden_states": torch.zeros(0, 2, 4), "token_ids": torch.arange(0)}, "at least one token"),
    "integers": ({"hidden_states": torch.zeros(2, 2, 4).int(), "token_ids": torch.arange(2)}, "is I32: expected BF16"),
    "fractions": ({"hidden_states": torch.zeros(2, 2, 4), "token_ids": torch.zeros(2)}, "is F32: expected I64"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_a_file_that_is_no_dump_is_refused(tmp_path, tensors, message):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BadInputError, match=message):
        VllmDumps(tmp_path, [0, 1], "float32", prompts_only=True)


def test_dumps_of_two_models_links_and_unfinished_ones_are_refused(tmp_path):
    from safetensors.torch import save_file

    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    (tmp_path / "d/b.safetensors").symlink_to(tmp_path / "d/a.safetensors")
    with pytest.raises(BadInputError, match="symbolic link"):
        VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)
    (tmp_path / "d/b.safetensors").unlink()
    other = {"hidden_states": torch.zeros(2, 2, 8, dtype=torch.bfloat16), "token_ids": torch.arange(2)}
    save_file(other, tmp_path / "d/b.safetensors")
    with pytest.raises(BadInputError, match=r"hidden sizes \[8, 24\]: expected dumps of one model"):
        VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)
    (tmp_path / "d/b.safetensors").unlink()
    with (tmp_path / "d/a.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInputError, match="still being written by vLLM"):
            VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)
    VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)


def test_token_ids_must_be_ids(tmp_path, identity):
    from safetensors.torch import load_file, save_file

    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    found = load_file(tmp_path / "d/a.safetensors")
    save_file(found | {"token_ids": torch.tensor([1, -2])}, tmp_path / "d/a.safetensors")
    source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)
    assert "expected token ids" in import_source(source, tmp_path / "lake", identity).causes["a"]


LINES = {
    "no JSON": (b"{", "line 1 is no JSON"),
    "a list": (b"[1]", "line 1 is no JSON object"),
    "no request": (b'{"prompt_length": 2}', "request_id is None"),
    "twice": (b'{"request_id": "a", "prompt_length": 2}\n' * 2, "line 2: request_id is 'a': expected a string that no"),
    "no line for a dump": (b'{"request_id": "b", "prompt_length": 2}', "has no line for the request 'a'"),
    "a length in words": (
        b'{"request_id": "a", "prompt_length": "2"}',
        "prompt_length is '2': expected a whole number",
    ),
    "correct in words": (b'{"request_id": "a", "prompt_length": 2, "correct": "yes"}', "expected true, false or null"),
}


@pytest.mark.parametrize(("text", "message"), LINES.values(), ids=LINES)
def test_lines_that_do_not_fit_are_refused(tmp_path, text, message):
    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    (tmp_path / "s.jsonl").write_bytes(text)
    with pytest.raises(BadInputError, match=message):
        VllmDumps(tmp_path / "d", [0, 1], "bfloat16", samples=tmp_path / "s.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt_length": 3}, "prompt_length is 3, but there are 2 token_ids"),
        ({"prompt_length": 1, "token_ids": [1, 3]}, "are not the 2 of"),
        ({"prompt_length": 1, "token_ids": [1, 2, 3, 4]}, "are not the 2 of"),
        ({"prompt_length": 1, "logprobs": [-1, -1]}, "2 logprobs for the 1 tokens"),
        ({"prompt_length": 1, "exact_answer_tokens": [0, 1]}, "do not lie in the answer"),
        ({}, "expected key, token_ids and prompt_length"),
    ],
)
def test_a_line_that_contradicts_its_dump_fails_alone(tmp_path, identity, line, message):
    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    dump(tmp_path / "d", "b", [1, 2], [0, 1])
    samples = lines(tmp_path / "s.jsonl", {"request_id": "a"} | line, {"request_id": "b", "prompt_length": 1})
    source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", samples=samples, positions="-1,all_generated")
    done = import_source(source, tmp_path / "lake", identity)
    assert done.imported == 1 and message in done.causes["a"]


def test_models_whose_block_0_is_fed_with_more_than_the_table_are_refused(tmp_path):
    dump(tmp_path / "d", "a", [1, 2], [1])
    for name, architecture in {"gpt2": "GPT2LMHeadModel", "gemma2": "Gemma2ForCausalLM"}.items():
        with pytest.raises(BadInputError, match=f"the family {name} .* before block 0"):
            VllmDumps(tmp_path / "d", [1], "bfloat16", prompts_only=True, model=model(tmp_path / name, architecture))
    with pytest.raises(UnknownNameError):
        VllmDumps(tmp_path / "d", [1], "bfloat16", prompts_only=True, model=model(tmp_path / "x", "XForCausalLM"))
    with pytest.raises(BadInputError, match="layer id 9: the model has 8 layers"):
        VllmDumps(tmp_path / "d", [9], "bfloat16", prompts_only=True, model=model(tmp_path / "m"))
    (tmp_path / "m/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed_tokens.weight": "../x"}})
    )
    with pytest.raises(BadInputError, match="names no file of the folder"):
        VllmDumps(tmp_path / "d", [1], "bfloat16", prompts_only=True, model=tmp_path / "m")


def test_an_identity_is_not_guessed(tmp_path, identity):
    dump(tmp_path / "d", "a", [1, 2], [0, 1])
    source = VllmDumps(tmp_path / "d", [0, 1], "bfloat16", prompts_only=True)
    for name in identity:
        given = {field: value for field, value in identity.items() if field != name}
        with pytest.raises(BadInputError, match=f"the identity lacks {name}"):
            import_source(source, tmp_path / "lake", given)
    with pytest.raises(BadInputError, match="the identity says compute_dtype float16, the source bfloat16"):
        import_source(source, tmp_path / "lake", identity | {"compute_dtype": "float16"})
    with pytest.raises(BadInputError, match="compute_dtype is 'int8'"):
        import_source(source, tmp_path / "lake", identity | {"compute_dtype": "int8"})
    with pytest.raises(BadInputError, match="says that stored_dtype is 'float32'"):
        import_source(source, tmp_path / "lake", identity | {"stored_dtype": "float32"})
    with pytest.raises(BadInputError, match="the identity is to be given"):
        import_source(source, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()
