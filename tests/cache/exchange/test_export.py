"""Every format gives back every bit of a capture, read by the library that the format belongs to."""

import hashlib
import json
import zipfile
from pickletools import genops

import numpy as np
import pyarrow.parquet as pq
import pytest

from hiddenlake.cache.exchange.exporting import export_capture
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.own_export import OwnExport
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.coverage import DTYPES

KINDS = [("cells", "bfloat16"), ("cells", "float32"), ("both", "bfloat16"), ("tokens", "bfloat16"), ("both", "float32")]
KINDS += [("both", "float16")] * ("float16" in DTYPES)
# Small enough that every site has several files, and every file several blocks.
SMALL = {"shard_bytes": 3000, "memory_bytes": 25_000}


def same(found, expected):
    """Bit for bit, NaN included; both as NumPy has them."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))


def parts(capture):
    """(site, layer, stem of its files)."""
    for site in capture.coverage.widths:
        for layer in capture.coverage.layers if SITES[site].layered else [None]:
            yield site, layer, f"{site}/{site if layer is None else f'layer_{layer}'}"


def as_numpy(tensor):
    """A torch tensor's bits as the store's."""
    import ml_dtypes
    import torch

    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def check_shards(capture, folder, ending, load):
    """Every sample lies where the index says."""
    index = pq.read_table(folder / "index.parquet").to_pylist()
    assert [row["key"] for row in index] == capture.keys
    assert [row["row"] for row in index] == list(range(len(capture)))
    for site, layer, stem in parts(capture):
        for prefix, column in (("", "shard"), ("tokens/", "token_shard")):
            if column not in index[0]:
                continue
            files = sorted(folder.glob(f"{prefix}{stem}-*.{ending}"))
            shards = [load(file) for file in files]
            assert len(files) == max(row[column] for row in index) > 1
            if not prefix:
                rows = [shards[row["shard"] - 1][row["shard_row"]] for row in index]
                same(np.stack(rows, axis=1), capture.read(site, layer))
                continue
            stored = capture.read_tokens(site, layer)
            for i, row in enumerate(index):
                assert row["token_count"] == stored.lengths[i]
                found = shards[row["token_shard"] - 1][row["token_row"] :][: row["token_count"]]
                same(found, stored.values[stored.offsets[i] : stored.offsets[i + 1]])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_safetensors(captures, tmp_path, kind, dtype):
    from safetensors.torch import load_file

    capture = captures(kind, dtype)
    export_capture(capture, tmp_path / "out", "safetensors", **SMALL)
    check_shards(capture, tmp_path / "out", "safetensors", lambda file: as_numpy(load_file(file)["activations"]))


def test_safetensors_are_read_by_numpy_too_and_say_what_they_are(captures, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    capture = captures("cells", "float32")
    export_capture(capture, tmp_path / "out")
    file = tmp_path / "out/mlp_out/layer_2-00001-of-00001.safetensors"
    same(load_file(file)["activations"].swapaxes(0, 1), capture.read("mlp_out", 2))
    with safe_open(file, "numpy") as opened:
        facts = opened.metadata()
    assert json.loads(facts["identity"]) == capture.identity
    assert json.loads(facts["positions"]) == list(capture.coverage.positions)
    assert (facts["site"], facts["layer"]) == ("mlp_out", "2")
    assert (facts["first_key"], facts["last_key"]) == (capture.keys[0], capture.keys[-1])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_torch(captures, tmp_path, kind, dtype):
    import torch

    capture = captures(kind, dtype)
    export_capture(capture, tmp_path / "out", "torch", **SMALL)

    def load(file):
        found = torch.load(file, weights_only=True)
        assert found["keys"] == capture.keys[found["first_row"] :][: len(found["keys"])]
        return as_numpy(found["activations"])

    check_shards(capture, tmp_path / "out", "pt", load)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_torch_files_name_nothing_but_what_rebuilds_a_tensor(captures, tmp_path, dtype):
    export_capture(captures("both", dtype), tmp_path / "out", "torch")
    files = list((tmp_path / "out").rglob("*.pt"))
    assert files
    for file in files:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            program = list(genops(archive.read(name)))
        named = {argument for opcode, argument, _ in program if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")}
        assert "STACK_GLOBAL" not in {opcode.name for opcode, _, _ in program}
        assert named == {
            "torch._utils _rebuild_tensor_v2",
            "torch BFloat16Storage" if dtype == "bfloat16" else "torch FloatStorage",
            "collections OrderedDict",
        }


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_npy(captures, tmp_path, kind, dtype):
    capture = captures(kind, dtype)
    export_capture(capture, tmp_path / "out", "npy", **SMALL)
    keys = pq.read_table(tmp_path / "out/keys.parquet").to_pylist()
    assert [row["key"] for row in keys] == capture.keys
    for site, layer, stem in parts(capture):
        if capture.coverage.positions:
            found = np.load(tmp_path / f"out/{stem}.npy", mmap_mode="r", allow_pickle=False)
            same(found, capture.read(site, layer, dtype="float32"))
        if capture.coverage.tokens:
            found = np.load(tmp_path / f"out/tokens/{stem}.npy", mmap_mode="r", allow_pickle=False)
            stored = capture.read_tokens(site, layer, dtype="float32")
            same(found, stored.values)
            assert [row["token_row"] for row in keys] == stored.offsets[:-1].tolist()
            assert [row["token_count"] for row in keys] == stored.lengths.tolist()


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_datasets(captures, tmp_path, kind, dtype):
    datasets = pytest.importorskip("datasets")
    capture = captures(kind, dtype)
    export_capture(capture, tmp_path / "out", "datasets", shard_bytes=20_000, memory_bytes=400_000)
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 1
    samples = capture.samples()
    for name in samples.column_names:
        # NaN is not equal to itself
        if name not in ("slot", "logprobs"):
            assert list(found[name]) == samples[name].to_pylist(), name
    found.set_format("numpy")
    for site, layer, _ in parts(capture):
        column = site if layer is None else f"{site}_{layer}"
        if capture.coverage.positions:
            cells = capture.read(site, layer, dtype="float32")
            assert found.features[column].shape == (cells.shape[0], cells.shape[2])
            for i in range(len(capture)):
                same(found[i][column], cells[:, i])
        if capture.coverage.tokens:
            stored = capture.read_tokens(site, layer, dtype="float32")
            for i in range(len(capture)):
                rows = stored.values[stored.offsets[i] : stored.offsets[i + 1]]
                same(np.asarray(found[i][f"tokens_{column}"], np.float32).reshape(rows.shape), rows)


@pytest.mark.parametrize("format", ["safetensors", "datasets", "npy", "torch"])
def test_the_manifest_names_every_file_and_its_hash(captures, tmp_path, format):
    capture = captures()
    done = export_capture(capture, tmp_path / "out", format)
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    there = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == there.keys() - {"manifest.json"}
    for name, record in manifest["files"].items():
        data = there[name].read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["identity"] == capture.identity
    assert done.files == len(manifest["files"]) and done.bytes == sum(f["bytes"] for f in manifest["files"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["safetensors", "datasets", "npy", "torch"])
def test_the_cost_is_stated_before_the_start_and_is_what_is_written(captures, tmp_path, format):
    from hiddenlake.cache.exchange.cost import Watcher

    class Heard(Watcher):
        costs, done = [], []

        def planned(self, cost):
            assert list(tmp_path.iterdir()) == []
            self.costs.append(cost)

        def progressed(self, done, total):
            self.done.append((done, total))

    heard = Heard()
    export_capture(captures(), tmp_path / "out", format, watcher=heard)
    (cost,) = heard.costs
    assert heard.done[-1] == (cost.data_bytes, cost.data_bytes)
    files = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".arrow", ".npy", ".pt")]
    assert len(files) == cost.files
    written = sum(file.stat().st_size for file in files)
    # headers and, in Arrow, the samples' columns
    overhead = cost.table_bytes * 4 + 10_000 * len(files)
    assert cost.data_bytes <= written <= cost.data_bytes + overhead


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_an_export_can_be_a_capture_again(captures, tmp_path, kind, dtype):
    capture = captures(kind, dtype)
    export_capture(capture, tmp_path / "out", **SMALL)
    source = OwnExport(tmp_path / "out")
    done = import_source(source, tmp_path / "again", shard_samples=4)
    assert (done.imported, done.present, done.failed) == (len(capture), 0, 0)
    again = open_capture(tmp_path / "again")
    assert {name: again.identity[name] for name in capture.identity} == capture.identity
    assert again.identity["imported"] == "export" and "imported" in again.provenance
    assert again.coverage == capture.coverage and again.keys == capture.keys
    assert again.samples().drop_columns(["slot"]).equals(capture.samples().drop_columns(["slot"]))
    for site, layer, _ in parts(capture):
        if capture.coverage.positions:
            same(again.read(site, layer), capture.read(site, layer))
        if capture.coverage.tokens:
            same(again.read_tokens(site, layer).values, capture.read_tokens(site, layer).values)


def test_a_part_of_a_capture(captures, tmp_path):
    from safetensors.torch import load_file

    capture = captures()
    export_capture(capture, tmp_path / "out", sites=["resid_post"], layers="2,5", positions="-1,last_q")
    names = sorted(p.name for p in (tmp_path / "out").rglob("*.safetensors"))
    assert names == ["layer_2-00001-of-00001.safetensors", "layer_5-00001-of-00001.safetensors"]
    found = as_numpy(load_file(tmp_path / "out/resid_post" / names[1])["activations"])
    same(found.swapaxes(0, 1), capture.read("resid_post", 5, ["-1", "last_q"]))
    index = pq.read_table(tmp_path / "out/index.parquet")
    columns = [capture.coverage.positions.index(name) for name in ("-1", "last_q")]
    expected = [[row[column] for column in columns] for row in capture.samples()["token_index"].to_pylist()]
    assert index["token_index"].to_pylist() == expected


@pytest.mark.slow
def test_the_card_makes_the_index_a_dataset(captures, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    export_capture(captures(), tmp_path / "out")
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["key"][:] == captures().keys and "shard_row" in found.column_names


def test_labels_stand_beside_the_samples(tiny, tmp_path):
    import pyarrow as pa

    tiny.write(tmp_path / "lake", 6)
    capture = open_capture(tmp_path / "lake")
    (tmp_path / "lake/labels").mkdir(exist_ok=True)
    pq.write_table(pa.table({"key": capture.keys[:4], "judge": [1, 2, 3, 4]}), tmp_path / "lake/labels/second.parquet")
    export_capture(capture, tmp_path / "out", "npy")
    assert pq.read_table(tmp_path / "out/keys.parquet")["second"].to_pylist() == [1, 2, 3, 4, None, None]
