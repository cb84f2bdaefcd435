"""The safetensors format: what we write, the library reads; what it writes, we read; what lies, nobody reads."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.tensor_file import DTYPES, TensorFile, header, inside


def raw(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "an empty file": (b"", "its header claims"),
    "no header": (b"\0\0\0", "its header claims"),
    "a header longer than the file": (raw({}, length=10_000), "its header claims 10000 bytes"),
    "a header of all memory": (raw({}, length=2**63), "its header claims"),
    "no JSON": (raw(b"{nonsense}"), "no JSON object"),
    "bytes that are no text": (raw(b"\xff\xfe"), "no JSON object"),
    "a list": (raw([1]), "no JSON object"),
    "nesting without an end": (raw(b"[" * 100_000), "no JSON object"),
    "a name twice": (raw(b'{"a":{},"a":{}}'), "'a' occurs twice"),
    "metadata that is no object": (raw({"__metadata__": "x"}), "no object of strings"),
    "metadata of numbers": (raw({"__metadata__": {"x": 1}}), "no object of strings"),
    "a tensor that is a number": (raw({"a": 3}), "expected dtype, shape and data_offsets"),
    "a field too many": (raw({"a": entry() | {"file": "/x"}}, bytes(8)), "expected dtype, shape"),
    "an unknown dtype": (raw({"a": entry("F33")}, bytes(8)), "unknown dtype 'F33'"),
    "a dtype that is a list": (raw({"a": entry() | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "a negative axis": (raw({"a": entry(shape=(-2,))}, bytes(8)), "whole numbers from 0"),
    "an axis that is true": (raw({"a": entry(shape=(True, 2))}, bytes(8)), "whole numbers from 0"),
    "an axis that is a fraction": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "whole numbers from 0"),
    "a huge axis": (raw({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "do not span"),
    "a hundred axes": (raw({"a": entry(shape=(1,) * 100)}, bytes(8)), "whole numbers from 0"),
    "offsets the wrong way round": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "do not span"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "whole numbers from 0"),
    "offsets past the end": (raw({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8)), "end at byte"),
    "a negative offset": (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "whole numbers from 0"),
    "an overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps another one"),
    "the same bytes twice": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps another one"),
    "a gap": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "leaves a gap"),
    "a gap in front": (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "leaves a gap"),
    "bytes behind": (raw({"a": entry()}, bytes(9)), "end at byte"),
    "half a byte": (raw({"a": entry("F4", (3,), (0, 1))}, bytes(1)), "do not span"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_lying_file_is_refused(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=message) as raised:
        TensorFile(path)
    assert str(path) in str(raised.value)


def test_no_descriptor_is_left_open_by_a_refusal(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": 3}))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(BadInputError):
            TensorFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        TensorFile(path).close()
    except BadInputError:
        pass


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=4,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(max_size=5), max_size=2),
)
def test_what_is_written_is_read_here_and_by_the_library(tmp_path_factory, tensors, metadata):
    from safetensors import safe_open

    metadata = {name: value for name, value in metadata.items() if value.isprintable()}
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    values = {
        name: np.arange(int(np.prod(shape)), dtype=np.float32).astype(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in tensors.items()
    }
    data = b"".join(np.ascontiguousarray(v).reshape(-1).view(np.uint8).tobytes() for v in values.values())
    path.write_bytes(header(tensors, metadata) + data)
    with TensorFile(path) as file:
        assert file.metadata == metadata
        for name, value in values.items():
            found = file.read(name)
            assert found.shape == value.shape and found.dtype == value.dtype and found.tobytes() == value.tobytes()
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(tensors)
        for name, value in values.items():
            tensor = library.get_tensor(name)
            assert tuple(tensor.shape) == value.shape
            assert np.array_equal(tensor.double().numpy(), value.astype(np.float64))


def test_rows_of_a_tensor(tmp_path):
    from safetensors.numpy import save_file

    values = np.arange(60, dtype=np.float32).reshape(5, 3, 4).astype(ml_dtypes.bfloat16)
    save_file({"a": values, "b": np.arange(3)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert np.array_equal(file.read("a", 1, 3).view(np.uint16), values[1:3].view(np.uint16))
        assert file.read("a", 5, 5).shape == (0, 3, 4)
        assert file.read("b").tolist() == [0, 1, 2]
        for rows in [(-1, 2), (0, 6), (3, 2)]:
            with pytest.raises(BadInputError, match="are not there"):
                file.read("a", *rows)
        with pytest.raises(BadInputError, match=r"no tensor 'c': it has 'a', 'b'|no tensor 'c': it has 'b', 'a'"):
            file.read("c")
        with pytest.raises(BadInputError, match="is BF16: expected F32"):
            file.tensor("a", ("F32",))


def test_a_file_that_becomes_shorter_is_an_error_and_no_crash(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((1000, 8), np.float32)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        os.truncate(tmp_path / "x.safetensors", 5000)
        with pytest.raises(BadInputError, match="too early"):
            file.read("a")


def test_links_and_names_that_lead_out_are_refused(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.safetensors").write_bytes(raw({}))
    (root / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "linked").symlink_to(tmp_path)
    assert inside(root, "sub/a.safetensors") == root / "sub/a.safetensors"
    for name in ["../secret.safetensors", "sub/../../x", str(tmp_path / "secret.safetensors"), "..\\x", "a\0b", "", 3]:
        with pytest.raises(BadInputError, match="file name"):
            inside(root, name)
    for name in ["link.safetensors", "linked/secret.safetensors"]:
        with pytest.raises(BadInputError, match="is a symbolic link"):
            inside(root, name)
    with pytest.raises(BadInputError, match="a symbolic link is not followed"):
        TensorFile(root / "link.safetensors")
    os.mkfifo(root / "pipe.safetensors")
    for name in ["pipe.safetensors", "sub"]:
        with pytest.raises(BadInputError, match="no regular file"):
            TensorFile(root / name)
    with pytest.raises(BadInputError, match="No such file"):
        TensorFile(root / "absent.safetensors")
