"""Captures that lie: each is refused by an error that names the file, at once, in little memory, and inside its folder."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c

from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.commits import FileRecord
from hiddenlake.cache.store.root import new_root, read_root
from hiddenlake.cache.store.signing import sign, to_json_bytes

SAMPLES = 6
MOST_SECONDS = 5.0  # of all nine uses together; the machine is shared
MOST_BYTES = 96 << 20  # tables may take 64 MiB

CASES = {}

pytestmark = pytest.mark.slow


def case(file, *lies):
    """file : that the error must name."""

    def register(make):
        for lie in lies or (None,):
            name = make.__name__ if lie is None else f"{make.__name__}[{str(lie)[:40]}]"
            assert name not in CASES
            CASES[name] = (make, lie, file)
        return make

    return register


def edit_root(path, change):
    document = json.loads((path / "zarr.json").read_text())
    facts = document["attributes"]["hiddenlake"]
    del facts["crc32c"]
    change(facts, document)
    document["attributes"]["hiddenlake"] = sign(facts)
    (path / "zarr.json").write_text(json.dumps(document))


def edit_commit(path, change, shard=0):
    file = path / "commits" / f"{shard}.json"
    body = json.loads(file.read_text())
    del body["crc32c"]
    change(body)
    file.write_text(json.dumps(sign(body)))


def put(path, name, data):
    """A file with the record that its commit has of it."""
    (path / name).write_bytes(data)
    edit_commit(path, lambda body: body["files"].update({name: FileRecord.of(data).to_json()}))


NUMBERS = (-1, 0, 1 << 40, 10**30, 0.5, 4.0, float("nan"), float("inf"), "4", None, True, [4], {})


@case("zarr.json", *NUMBERS)
def shard_samples(path, lie):
    edit_root(path, lambda facts, _: facts.update(shard_samples=lie))


@case("zarr.json", -1, 10**30, 0.5, float("nan"), "4", None, [4])
def planned(path, lie):
    edit_root(path, lambda facts, _: facts.update(planned=lie))


@case("zarr.json", *NUMBERS)
def width(path, lie):
    def change(facts, _):
        facts["coverage"]["widths"] = dict.fromkeys(facts["coverage"]["widths"], lie)

    edit_root(path, change)


@case("zarr.json", [-1], [0.5], [0, 1 << 70], [float("nan")], [True], ["0"], [[0]], [2, 1], "012", None, 3, {"0": 1})
def layers(path, lie):
    edit_root(path, lambda facts, _: facts["coverage"].update(layers=lie))


@case("zarr.json", ["../../x"], ["/etc/passwd"], ["last_q"] * 2, [7], "last_q", [None], {"last_q": 1}, None)
def positions(path, lie):
    edit_root(path, lambda facts, _: facts["coverage"].update(positions=lie))


@case("zarr.json", ["../outside"], ["/etc"], [7], [], "mlp_out", [["mlp_out"]], None)
def sites(path, lie):
    edit_root(path, lambda facts, _: facts["coverage"].update(sites=lie))


@case("zarr.json", "gzip", "pickle", None, 7, ["none"], {"name": "none"})
def codec(path, lie):
    edit_root(path, lambda facts, _: facts.update(codec=lie))


@case("zarr.json", "object", "|O", "float64", None, 7)
def dtype(path, lie):
    edit_root(path, lambda facts, _: facts["coverage"].update(dtype=lie))


@case("zarr.json", "identity", "provenance", "coverage", "planned", "codec")
def missing_fact(path, lie):
    edit_root(path, lambda facts, _: facts.pop(lie))


@case("zarr.json", [], "x", None, 7)
def identity(path, lie):
    edit_root(path, lambda facts, _: facts.update(identity=lie))


@case("zarr.json", -4, 1 << 70, 4.5, "8", None)
def sample_axis(path, lie):
    def change(_, document):
        document["consolidated_metadata"]["metadata"]["committed"]["shape"] = [lie]

    edit_root(path, change)


@case("zarr.json")
def another_arrays_metadata(path, _):
    def change(_, document):
        document["consolidated_metadata"]["metadata"]["mlp_out"]["shape"][0] = 10**12

    edit_root(path, change)


DOCUMENTS = {
    "spaces": lambda: b" " * (1 << 30),
    "nested": lambda: b"[" * 5_000_000,
    "nested objects": lambda: b'{"a":' * 1_000_000,
    "long number": lambda: b"9" * 1_000_000,
    "not utf8": lambda: b'{"a": "\xff\xfe"}',
    "list": lambda: b"[]",
    "null": lambda: b"null",
    "nothing": lambda: b"",
    "binary": lambda: bytes(range(256)) * 10,
}


def write_document(file, lie):
    if lie == "spaces":
        with open(file, "wb") as out:
            out.truncate(1 << 30)  # as large, and of zeros, but it takes no room on the disk of who tests
    else:
        file.write_bytes(DOCUMENTS[lie]())


@case("zarr.json", *DOCUMENTS)
def root_document(path, lie):
    write_document(path / "zarr.json", lie)


@case("commits/0.json", *DOCUMENTS)
def commit_document(path, lie):
    write_document(path / "commits" / "0.json", lie)


@case("verify.json", *DOCUMENTS)
def verify_document(path, lie):
    write_document(path / "verify.json", lie)


# One with nothing in it is what a power cut may leave, and nobody's.
@case("claims/0", *(name for name in DOCUMENTS if name != "nothing"))
def claim_document(path, lie):
    (path / "commits" / "0.json").unlink()
    write_document(path / "claims" / "0", lie)


@case("commits/0.json", -1, 1 << 62, 1 << 70, 0.5, float("nan"), "8", None, [8])
def record_size(path, lie):
    edit_commit(path, lambda body: body["files"]["samples/0.parquet"].update(size=lie))


@case("commits/0.json", -1, 1 << 70, 0.5, "8", None)
def data_size_of_no_file(path, lie):
    edit_commit(path, lambda body: body["files"]["embed/c.0.0.0"].update(size=lie))


@case("c.0.0", 0, 1 << 62, 1 << 35)
def data_size(path, lie):
    """Of a file that is as long as it says, where that can be."""
    name = "embed/c.0.0.0"
    if lie == 1 << 35:
        with open(path / name, "r+b") as file:
            file.truncate(lie)
    edit_commit(path, lambda body: body["files"][name].update(size=lie))
    if lie != 1 << 35:
        return
    crc = "row_crc/embed/c.0.0"
    with open(path / crc, "r+b") as file:
        file.truncate(lie)
    edit_commit(path, lambda body: body["files"][crc].update(size=lie))


@case(
    "commits/0.json", "../../outside/secret", "/etc/passwd", "samples/1.parquet", "embed/../../outside/secret", "", "\0"
)
def file_name(path, lie):
    def change(body):
        body["files"][lie] = body["files"].pop("samples/0.parquet")

    edit_commit(path, change)


@case("commits/0.json", "crcs", "crc32c", "no base64", "odd", "one chunk", "no record", "other kind")
def record(path, lie):
    name = "embed/c.0.0.0"
    change = {
        "crcs": lambda files: files[name].pop("crcs"),
        "crc32c": lambda files: files[name].update(crc32c=7),
        "no base64": lambda files: files[name].update(crcs="*" * 16),
        "odd": lambda files: files[name].update(crcs=base64.b64encode(b"12345").decode()),
        "one chunk": lambda files: files[name].update(crcs=""),
        "no record": lambda files: files.update({name: 7}),
        "other kind": lambda files: files.update({"samples/0.parquet": {"size": 8, "crcs": ""}}),
    }[lie]
    edit_commit(path, lambda body: change(body["files"]))


@case("commits/0.json", [7], ["key-0001"] * 4, [["key"]] * 4, [None, "a"], "abcd", None, [True] * 4, ["a"] * 100_000)
def keys(path, lie):
    edit_commit(path, lambda body: body.update(keys=lie))


@case("commits", "key of another shard")
def key_of_another(path, _):
    other = json.loads((path / "commits" / "1.json").read_text())["keys"]
    mine = next(key for key in other if key)
    edit_commit(path, lambda body: body["keys"].__setitem__(0, mine))


@case("commits/0.json", [[0, 0]], [None] * 4, [[0]] * 4, [["0", 0]] * 4, [[0, 1e300]] * 4, [[1 << 70, 0]] * 4, None)
def order(path, lie):
    edit_commit(path, lambda body: body.update(order=lie))


@case("commits/0.json", 1, -1, "0", None, 0.5)
def shard_number(path, lie):
    edit_commit(path, lambda body: body.update(shard=lie))


@case("commits/0.json", [1 << 60, 4], [-5, 4], [0, 1 << 60], [0, -4], [0.5, 4], ["0", 4], [0], [0, 10**4])
def span(path, lie):
    edit_commit(path, lambda body: body["spans"].__setitem__(0, lie))


@case("commits/0.json", {"0": 1 << 40}, {"0": -1}, {"-1": 1}, {"x": 1}, {"0": 0.5}, {str(1 << 60): 1}, [0], None)
def token_shards(path, lie):
    edit_commit(path, lambda body: body.update(token_shards=lie))


@case("commits/0.json", {"mlp_out": 7}, [7], {"mlp_out": {"relative": "x", "cosine": 0, "rows": 1}})
def losses(path, lie):
    edit_commit(path, lambda body: body.update(losses=lie))


@case("commits/7.json")
def commit_of_a_shard_far_away(path, _):
    shutil.copy(path / "commits" / "0.json", path / "commits" / "7.json")


@case("labels/l.parquet", "zip bomb", "dictionary bomb", "list bomb", "no parquet", "binary keys", "nothing")
def labels(path, lie):
    file, text = path / "labels" / "l.parquet", "a" * 900_000
    one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array([text]))
    if lie == "zip bomb":
        table = pa.table({"key": ["k"] * 300, "value": [text] * 300})
        pq.write_table(table, file, compression="zstd", use_dictionary=False)
    elif lie == "dictionary bomb":
        pq.write_table(pa.table({"key": one}), file, compression="zstd")
    elif lie == "list bomb":
        pq.write_table(pa.table({"key": ["a"], "value": [[7] * 20_000_000]}), file, compression="zstd")
    elif lie == "binary keys":
        pq.write_table(pa.table({"value": [1]}), file)
    else:
        file.write_bytes(b"PAR1" * 9 if lie == "no parquet" else b"")


@case("failures/f.parquet", "other columns", "nulls", "pickles")
def failures(path, lie):
    file = path / "failures" / "f.parquet"
    if lie == "nulls":
        from hiddenlake.cache.store.tables import failure_schema

        columns = {field.name: pa.nulls(2, field.type) for field in failure_schema()}
        pq.write_table(pa.table(columns), file)
    else:
        pickled = b"cos\nmkdir\n(S'" + str(path / "pickled").encode() + b"'\ntR."
        metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
        field = pa.field("key", pa.string(), metadata=metadata if lie == "pickles" else None)
        pq.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), file)


def samples_table(path):
    return pq.read_table(path / "samples" / "0.parquet")


@case(
    "samples/0.parquet",
    "no slots",
    "other slots",
    "null ids",
    "other type",
    "few indices",
    "bomb",
    "no parquet",
    "many",
)
def samples(path, lie):
    table, name = samples_table(path), "samples/0.parquet"
    out = io.BytesIO()
    if lie == "no parquet":
        return put(path, name, b"PAR1 and no more, PAR1")
    if lie == "no slots":
        table = table.drop_columns(["slot"])
    else:
        column, values = {
            "other slots": ("slot", pa.array([1 << 30] * len(table), pa.int32())),
            "null ids": ("token_ids", pa.nulls(len(table), pa.list_(pa.int32()))),
            "other type": ("prompt_length", pa.array(["x"] * len(table))),
            "few indices": ("token_index", pa.array([[0]] * len(table), pa.list_(pa.int32()))),
            "bomb": ("prompt", pa.array(["a" * 60_000_000] * len(table))),
            "many": ("answers", pa.array([["a"] * 8_000_000] + [["b"]] * (len(table) - 1))),
        }[lie]
        table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, out, compression="zstd")
    put(path, name, out.getvalue())


LINKED = (
    "zarr.json", "commits/0.json", "claims/0", "samples/0.parquet", "embed/c.0.0.0", "row_crc/embed/c.0.0",
    "verify.json", "labels/l.parquet", "failures/f.parquet", "writers/w.jsonl", "writers/lock",
)  # fmt: skip


def replace_by(path, name, make):
    file = path / name
    if name == "claims/0":
        (path / "commits" / "0.json").unlink()
    file.unlink(missing_ok=True)
    make(file)


def register_files():
    for name in LINKED:

        def link(path, _, name=name):
            replace_by(path, name, lambda file: file.symlink_to(path.parents[1] / "outside" / "secret"))

        def pipe(path, _, name=name):
            replace_by(path, name, os.mkfifo)

        def folder(path, _, name=name):
            replace_by(path, name, Path.mkdir)

        CASES[f"symbolic link[{name}]"] = (link, None, name)
        CASES[f"pipe[{name}]"] = (pipe, None, name)
        if name not in ("claims/0", "verify.json") and not name.startswith(
            ("labels", "failures", "writers", "commits")
        ):
            CASES[f"folder[{name}]"] = (folder, None, name)  # others are no file, and not looked at
    for name in ("commits", "samples", "embed", "row_crc", "row_crc/embed", "labels", "failures", "claims", "writers"):

        def linked_folder(path, _, name=name):
            (path / name).rename(path.parents[1] / "outside" / f"{path.name}-{name.replace('/', '-')}")
            (path / name).symlink_to(path.parents[1] / "outside" / f"{path.name}-{name.replace('/', '-')}")

        CASES[f"folder that is a link[{name}]"] = (linked_folder, None, name)


register_files()


@case("c.0.0", "none", "zstd", "fp8")
def gigabytes_in_a_few_bytes(path, lie):
    """Everything fits together, except that the files are not that long."""
    old = read_root(open_backend(path))
    widths = dict.fromkeys(old.coverage.widths, 1 << 22)
    coverage = replace(old.coverage, widths=widths, tokens=None)
    layout = replace(old.layout, coverage=coverage, samples=1 << 16, chunk_tokens=0, shard_tokens=0, codec=lie)
    shutil.rmtree(path)
    place = open_backend(path)
    root = new_root(old.identity, layout, 1, {})
    assert place.make(root.files() | layout.coordinates(), list(layout.folders()))
    B, files = layout.samples, {}
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0xE0]) + (B * layout.files["embed"].row_bytes).to_bytes(8, "little")
    for site, file in layout.files.items():
        count = len(file.present)
        data = b"".join((frame + crc32c(frame).to_bytes(4, "little")).ljust(4096, b"\0") for _ in range(count))
        index = file.index(np.full(count, len(frame))) if not file.fixed else b"index"
        data += index
        record = {"size": len(data), "crcs": base64.b64encode(crc32c(frame).to_bytes(4, "little") * count).decode()}
        if not file.fixed:
            record["lengths"] = base64.b64encode(np.full(count, len(frame), "<u4").tobytes()).decode()
        place.write(layout.data_file(site, 0), data)
        files[layout.data_file(site, 0)] = record
        for name in (layout.row_crc_file(site, 0), *([layout.scale_file(site, 0)] if lie == "fp8" else [])):
            place.write(name, b"12345678")
            files[name] = FileRecord.of(b"12345678").to_json()
    table = samples_table(path.parent / "intact")
    out = io.BytesIO()
    pq.write_table(table.slice(0, 1), out)
    place.write("samples/0.parquet", out.getvalue())
    files["samples/0.parquet"] = FileRecord.of(out.getvalue()).to_json()
    body = {
        "shard": 0, "writer": "w", "fencing": 1, "provenance": {}, "keys": ["k"] + [None] * (B - 1),
        "order": [[0, 0]] + [None] * (B - 1), "files": files, "time": "now",
    }  # fmt: skip
    (path / "commits" / "0.json").write_bytes(to_json_bytes(sign(body)))


@pytest.fixture(scope="module")
def said(tiny, tmp_path_factory):
    """case -> what each use of it said, seconds, bytes, and the files outside that it touched."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "lakes").mkdir()
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").write_text("{}")
    intact = folder / "lakes" / "intact"
    tiny.write(intact, SAMPLES, coverage=tiny.coverage(**tiny.KINDS["both"]))
    paths = [intact]
    for number, (make, lie, _) in enumerate(CASES.values()):
        path = shutil.copytree(intact, folder / f"{number}" / "c")
        (path.parent / "intact").symlink_to(intact)
        (folder / f"{number}" / "outside").symlink_to(folder / "outside")
        lake = folder / f"lake{number}" / "c"
        path.parent.rename(lake.parent)
        make(lake, lie)
        (lake.parent / "intact").unlink()
        (lake.parent / "outside").unlink()
        paths.append(lake)
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run(
        [sys.executable, script, str(folder / "outside")], input="\n".join(map(str, paths)), text=True,
        stdout=subprocess.PIPE, timeout=600,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == len(paths), f"it died of {list(CASES)[len(lines) - 1]}"
    assert set(lines[0][0].values()) == {None}
    return dict(zip(CASES, lines[1:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(said, name):
    uses, seconds, grown, touched = said[name]
    file = CASES[name][2]
    errors = {use: found for use, found in uses.items() if found is not None}
    for use, (kinds, text) in errors.items():
        assert "HiddenlakeError" in kinds or kinds[0] == "RuntimeError" and use == "verify", (use, kinds[0], text)
    assert any(file in text for _, text in errors.values()), errors
    assert touched == [] and seconds < MOST_SECONDS and grown < MOST_BYTES
    assert not os.path.exists("pickled")
