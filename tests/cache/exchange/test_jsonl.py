"""safetensors + JSONL become captures bit for bit; lines that do not fit their tensors are refused."""

import json

import numpy as np
import pytest

from hiddenlake.cache.errors import BadInputError, CorruptError
from hiddenlake.cache.exchange.exporting import export_capture
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.jsonl import JsonlSource
from hiddenlake.cache.exchange.own_export import OwnExport
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.verify import verify

WIDTH, LAYERS, SAMPLES = 8, (0, 3), 5
POSITIONS = ("last_q", "-1", "exact_answer_last")


def values(*shape, seed=0, dtype=np.float32):
    import ml_dtypes

    exact = np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)
    return exact if dtype == "bfloat16" else exact.astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """Cells of two sites, one tensor for all layers and one for each, and embed."""
    from safetensors.numpy import save_file

    arrays = {
        "mlp": values(SAMPLES, len(LAYERS), len(POSITIONS), WIDTH, seed=1),
        "embed": values(SAMPLES, len(POSITIONS), WIDTH, seed=2),
    }
    save_file(arrays, tmp_path / "cells.safetensors")
    for layer in LAYERS:
        arrays[f"resid_{layer}"] = values(SAMPLES, len(POSITIONS), WIDTH, seed=10 + layer)
        (tmp_path / "resid").mkdir(exist_ok=True)
        save_file({"x": arrays[f"resid_{layer}"]}, tmp_path / f"resid/{layer}.safetensors")
    return tmp_path, arrays


def line(i, **changed):
    found = {
        "key": f"q-{i}", "token_ids": list(range(i, i + 6)), "prompt_length": 4, "prompt": f"p {i}", "answer": "a",
        "answers": ["a"], "correct": i % 2 == 0, "group": "g",
        "activations": {
            "mlp_out": {"file": "cells.safetensors", "tensor": "mlp", "row": i},
            "resid_post": {"file": "resid/{layer}.safetensors", "tensor": "x", "row": i},
            "embed": {"file": "cells.safetensors", "tensor": "embed", "row": i},
        },
    } | changed  # fmt: skip
    return found


def write(folder, lines):
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_cells(folder, identity, dtype):
    root, arrays = folder
    path = write(root, [line(i, exact_answer_tokens=[4, 4]) if i != 2 else line(i) for i in range(SAMPLES)])
    source = JsonlSource(path, LAYERS, POSITIONS, dtype=dtype)
    done = import_source(source, root / "lake", identity)
    assert (done.imported, done.failed) == (SAMPLES, 0)
    capture = open_capture(root / "lake")
    assert capture.coverage.dtype == (dtype or "float32") and capture.coverage.layers == LAYERS
    assert capture.keys == [f"q-{i}" for i in range(SAMPLES)]
    mlp, embed = capture.read("mlp_out", dtype="float32"), capture.read("embed", dtype="float32")
    for i in range(SAMPLES):
        there = [0, 1] if i == 2 else [0, 1, 2]  # no exact answer, no activation
        assert np.array_equal(mlp[:, there, i], arrays["mlp"][i][:, there])
        assert np.array_equal(embed[there, i], arrays["embed"][i, there])
        for layer in LAYERS:
            found = capture.read("resid_post", layer, samples=i, dtype="float32")
            assert np.array_equal(found[there], arrays[f"resid_{layer}"][i, there])
    assert np.isnan(mlp[:, 2, 2]).all()
    row = capture.samples().to_pylist()[1]
    assert (row["token_index"], row["correct"], row["group"], row["answers"]) == ([3, 5, 4], False, "g", ["a"])
    assert row["finish_reason"] == "unknown" and np.isnan(row["logprobs"]).all()
    assert verify(root / "lake").ok


@pytest.mark.parametrize("split", [False, True])
def test_tokens(tmp_path, identity, split, monkeypatch):
    from safetensors.numpy import save_file

    from hiddenlake.cache.exchange import jsonl

    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 500)  # several blocks a sample
    lengths = [6, 30, 9]
    starts = np.cumsum([0, *lengths])
    stream, embed = (
        values(starts[-1], len(LAYERS), WIDTH, dtype="bfloat16"),
        values(starts[-1], WIDTH, dtype="bfloat16"),
    )
    save_file({"h": stream, "e": embed}, tmp_path / "t.safetensors")
    for n, layer in enumerate(LAYERS):
        save_file({f"h.{layer}": np.ascontiguousarray(stream[:, n])}, tmp_path / f"t{layer}.safetensors")
    place = (
        {"file": "t{layer}.safetensors", "tensor": "h.{layer}"} if split else {"file": "t.safetensors", "tensor": "h"}
    )
    lines = []
    for i, length in enumerate(lengths):
        rows = [int(starts[i]), int(starts[i + 1])]
        tokens = {"resid_mid": place | {"rows": rows}, "embed": {"file": "t.safetensors", "tensor": "e", "rows": rows}}
        lines.append({"key": f"{i}", "token_ids": [1] * length, "prompt_length": 2, "tokens": tokens})
    source = JsonlSource(write(tmp_path, lines), LAYERS, "all")
    import_source(source, tmp_path / "lake", identity)
    capture = open_capture(tmp_path / "lake")
    assert capture.coverage.dtype == "bfloat16"
    found = capture.read_tokens("resid_mid")
    assert found.lengths.tolist() == lengths
    assert np.array_equal(found.values.view(np.uint16), stream.swapaxes(0, 1).view(np.uint16))
    assert np.array_equal(capture.read_tokens("embed").values.view(np.uint16), embed.view(np.uint16))
    lines[1]["token_ids"].append(3)
    with pytest.raises(BadInputError, match="line 2: 30 tokens of a sample are stored: expected the 31"):
        JsonlSource(write(tmp_path, lines), LAYERS, "all")


def test_embed_from_the_model(folder, identity):
    from safetensors.numpy import save_file

    root, arrays = folder
    table = values(40, WIDTH, seed=5)
    (root / "model").mkdir()
    (root / "model/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"model.embed_tokens.weight": table}, root / "model/model.safetensors")
    lines = [line(i) for i in range(SAMPLES)]
    with pytest.raises(BadInputError, match="embed, and a model is named too"):
        JsonlSource(write(root, lines), LAYERS, POSITIONS, model=root / "model", compute_dtype="float32")
    for one in lines:
        del one["activations"]["embed"]
    with pytest.raises(BadInputError, match="line 1: activations lack embed, .* name the model's folder"):
        JsonlSource(write(root, lines), LAYERS, POSITIONS)
    with pytest.raises(BadInputError, match="compute_dtype is missing"):
        JsonlSource(write(root, lines), LAYERS, POSITIONS, model=root / "model")
    with pytest.raises(BadInputError, match="mean_all: a pooled embed is not in the model's table"):
        JsonlSource(write(root, lines), LAYERS, ["mean_all"], model=root / "model", compute_dtype="float32")
    source = JsonlSource(write(root, lines), LAYERS, POSITIONS, model=root / "model", compute_dtype="float32")
    import_source(source, root / "lake", identity | {"compute_dtype": "float32"})
    found = open_capture(root / "lake").read("embed", None, "last_q")
    assert np.array_equal(found, table[[i + 3 for i in range(SAMPLES)]])


def place(**changed):
    """A line whose embed is named otherwise."""
    good = line(1)
    return good | {"activations": good["activations"] | {"embed": good["activations"]["embed"] | changed}}


REFUSED = {
    "an absolute name": (place(file="/etc/passwd"), "leads out of"),
    "a name that leads out": (place(file="../cells.safetensors"), "leads out of"),
    "a link": (place(file="link.safetensors"), "symbolic link"),
    "no such file": (place(file="no.safetensors"), "No such file"),
    "no safetensors": (place(file="samples.jsonl"), "no usable safetensors file"),
    "no such tensor": (place(tensor="x"), "no tensor 'x'"),
    "a row that is not there": (place(row=SAMPLES), "rows 5 to 6 of 'embed'"),
    "a negative row": (place(row=-1), "rows -1 to 0"),
    "a row in words": (place(row="1"), "expected whole numbers"),
    "a row that is true": (place(row=True), "expected whole numbers"),
    "a field too many": (place(column=3), "expected file, tensor and row"),
    "a file that is a number": (place(file=3), "to be strings"),
    "another shape": (place(tensor="mlp"), "has the shape"),
    "layers of a site without": (place(tensor="{layer}"), "embed has no layers"),
    "an unknown site": (line(1, activations={"resid": {}}), "unknown site 'resid'"),
    "another site": (line(1, activations={"embed": line(1)["activations"]["embed"]}), "others of"),
    "no activations": (line(1, activations={}), "activations are missing"),
    "a list": (line(1, activations=[]), "is no object"),
    "tokens that nobody asked for": (
        line(1, tokens={"embed": {"file": "cells.safetensors", "tensor": "embed", "rows": [0, 2]}}),
        "tokens are given",
    ),
    "no key": (line(1, key=None), "key is None"),
    "an empty key": (line(1, key=""), "key is ''"),
    "the same key": (line(0), "key is 'q-0'"),
    "no ids": (line(1, token_ids=[]), "prompt_length is 4, but there are 0"),
    "ids below 0": (line(1, token_ids=[-1] * 6), "token_ids is"),
    "huge ids": (line(1, token_ids=[2**40] * 6), "token_ids is"),
    "half a character": (line(1, prompt="\ud800"), "prompt is"),
    "fewer indices": (line(1, token_index=[3]), "token_index has 1 entries"),
    "an index outside": (line(1, token_index=[3, 6, -1]), "token_index of -1 is 6"),
    "a pooled index": (line(1, token_index=[-2, 5, -1]), "token_index of last_q is -2"),
    "infinite logprobs": (line(1, logprobs=[float("-inf"), 0.0]), "logprobs is"),
}


@pytest.mark.parametrize(("second", "message"), REFUSED.values(), ids=REFUSED)
def test_a_line_that_does_not_fit_is_refused(folder, second, message):
    root, _ = folder
    (root / "link.safetensors").symlink_to(root / "cells.safetensors")
    with pytest.raises(BadInputError, match=message) as raised:
        JsonlSource(write(root, [line(0), second]), LAYERS, POSITIONS)
    assert "line 2" in str(raised.value)


def test_the_whole_file_is_refused(folder):
    root, _ = folder
    with pytest.raises(BadInputError, match="has no lines"):
        JsonlSource(write(root, []), LAYERS, POSITIONS)
    with pytest.raises(BadInputError, match="No such file"):
        JsonlSource(root / "absent.jsonl", LAYERS, POSITIONS)
    lines = [line(i) for i in range(SAMPLES)]
    with pytest.raises(BadInputError, match="expected .row 1, layer 3, position 3, width"):
        JsonlSource(write(root, lines), (0, 1, 2), POSITIONS)
    with pytest.raises(BadInputError, match=r"position 2"):
        JsonlSource(write(root, lines), LAYERS, POSITIONS[:2])
    with pytest.raises(BadInputError, match="ascending 0-based block indices"):
        JsonlSource(write(root, lines), LAYERS[::-1], POSITIONS)


def test_a_long_line_is_refused_before_it_is_parsed(folder, monkeypatch):
    from hiddenlake.cache.exchange import records

    monkeypatch.setattr(records, "_LINE_BYTES", 2000)
    root, _ = folder
    with pytest.raises(BadInputError, match="line 1 is longer than 2000 bytes"):
        JsonlSource(write(root, [line(0, prompt="x" * 3000)]), LAYERS, POSITIONS)


def test_a_value_that_is_not_finite_fails_alone(folder, identity):
    from safetensors.numpy import load_file, save_file

    root, _ = folder
    arrays = {name: array.copy() for name, array in load_file(root / "cells.safetensors").items()}
    arrays["mlp"][3, 1, 0, 2] = np.inf
    save_file(arrays, root / "cells.safetensors")
    source = JsonlSource(write(root, [line(i) for i in range(SAMPLES)]), LAYERS, POSITIONS)
    done = import_source(source, root / "lake", identity)
    assert (done.imported, list(done.causes)) == (SAMPLES - 1, ["q-3"]) and "finite" in done.causes["q-3"]


@pytest.mark.parametrize("name", ["index.parquet", "mlp_out/layer_2-00001-of-00001.safetensors"])
def test_an_export_with_a_flipped_byte_is_found(captures, tmp_path, name):
    export_capture(captures(), tmp_path / "out")
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(CorruptError, match="its SHA-256 is not that of manifest.json"):
        OwnExport(tmp_path / "out")


def test_an_index_that_is_not_ours_is_refused(captures, tmp_path):
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    export_capture(captures(), tmp_path / "out")
    index, manifest = tmp_path / "out/index.parquet", tmp_path / "out/manifest.json"
    good = pq.read_table(index)
    strings = good.set_column(good.column_names.index("shard"), "shard", pa.array(["../x"] * good.num_rows))
    nulls = good.set_column(good.column_names.index("shard_row"), "shard_row", pa.nulls(good.num_rows, pa.int64()))
    for table, message in [
        (strings, "column shard is string"),
        (nulls, "with 23 nulls"),
        (good.drop_columns(["token_row"]), "lacks token_row"),
        (good.set_column(0, "key", pa.array(["x"] * good.num_rows)), "key is 'x'"),
    ]:
        pq.write_table(table, index)
        facts = json.loads(manifest.read_bytes())
        facts["files"]["index.parquet"]["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(facts))
        with pytest.raises(BadInputError, match=message):
            OwnExport(tmp_path / "out")
    index.write_bytes(b"no Parquet")
    facts["files"]["index.parquet"]["sha256"] = hashlib.sha256(b"no Parquet").hexdigest()
    manifest.write_text(json.dumps(facts))
    with pytest.raises(BadInputError, match="fetch the export again"):
        OwnExport(tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "npy"}, "not that of a safetensors export"),
        ({"layers": ["../x"]}, "expected whole numbers"),
        ({"sites": {"../x": 1}}, "unknown sites ../x"),
        ({"files": []}, "files: not as an export writes it"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(captures, tmp_path, changed, message):
    export_capture(captures(), tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changed))
    with pytest.raises(BadInputError, match=message):
        OwnExport(tmp_path / "out")
    path.unlink()
    with pytest.raises(BadInputError, match="expected a folder that `hiddenlake export` made"):
        OwnExport(tmp_path / "out")
