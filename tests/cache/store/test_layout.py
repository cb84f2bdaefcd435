import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import StoreError, UnknownNameError
from hiddenlake.cache.positions import PAPER
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ALIGNMENT, ShardFile
from hiddenlake.cache.store.sizes import CHUNK_BYTES, choose_layout


def box(layers, hidden, dtype="bfloat16", positions=PAPER):
    return Coverage(("mlp_out",), tuple(range(layers)), positions, {"mlp_out": hidden}, dtype)


@pytest.mark.parametrize(("layers", "hidden", "samples"), [(30, 576, 256), (32, 4096, 32), (80, 8192, 16)])
def test_samples_a_shard_of_known_models(layers, hidden, samples):
    assert choose_layout(box(layers, hidden), 10_000, 2 << 30) == Layout(box(layers, hidden), samples)


def test_few_planned_samples_make_a_small_shard():
    assert choose_layout(box(30, 576), 100, 2 << 30).samples == 128


def test_little_memory_makes_a_small_shard_or_an_error_with_numbers():
    assert choose_layout(box(32, 4096), 10_000, 64 << 20).samples == 4
    with pytest.raises(StoreError, match=r"two shard buffers .* take .* MiB, .*may take 0\.0 MiB: allow more"):
        choose_layout(box(32, 4096), 10_000, 1000)


@given(
    st.integers(1, 40), st.integers(1, 9000), st.sampled_from(["bfloat16", "float32"]), st.integers(0, 5000),
    st.integers(20, 32),
)  # fmt: skip
def test_samples_a_shard_is_a_power_of_two_that_fits(layers, hidden, dtype, planned, bits):
    coverage = box(layers, hidden, dtype, ("last_q", "-1"))
    try:
        samples = choose_layout(coverage, planned, 1 << bits).samples
    except StoreError:
        assert 2 * Layout(coverage, 1).shard_bytes > 1 << bits
        return
    file = Layout(coverage, samples).files["mlp_out"]
    assert samples & (samples - 1) == 0
    assert 2 * Layout(coverage, samples).shard_bytes <= 1 << bits
    assert samples == 1 or file.chunk_bytes // 2 < CHUNK_BYTES and samples // 2 < max(planned, 1)


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=2), st.integers(1, 300), st.integers(1, 700),
    st.sampled_from(["bfloat16", "float32"]),
)  # fmt: skip
def test_a_shard_file_has_room_for_every_chunk_and_its_checksum(outer, samples, width, dtype):
    file = ShardFile(tuple(outer), samples, width, dtype)
    assert file.pitch % ALIGNMENT == 0 and 4 <= file.pitch - file.chunk_bytes < ALIGNMENT + 4
    assert file.size == file.index_offset + len(file.index)
    assert file.strides[-1] == file.bits.itemsize


def test_coverage_survives_json_and_fills_in_embed():
    coverage = box(3, 8)
    assert coverage.widths == {"embed": 8, "mlp_out": 8}
    assert Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage
    assert hash(coverage) == hash(box(3, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"sites": ()},
        {"sites": ("mlp_out", "mlp_out")},
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (-1,)},
        {"positions": ("last_q", "last_q")},
        {"widths": {"mlp_out": 0}},
        {"widths": {}},
        {"widths": {"mlp_out": 8, "embed": 9}},
        {"dtype": "float16"},
    ],
)
def test_bad_coverage_is_refused(change):
    good = {"sites": ("mlp_out",), "layers": (0, 1), "positions": ("last_q",), "widths": {"mlp_out": 8}}
    with pytest.raises(ValueError):
        Coverage(**good | change)


@pytest.mark.parametrize("site", ["embed", "nonsense"])
def test_a_site_without_layers_or_existence_cannot_be_covered(site):
    with pytest.raises(UnknownNameError, match="resid_post"):
        Coverage((site,), (0,), ("last_q",), {site: 8})


def test_files_of_a_shard_are_recognised():
    layout = Layout(box(3, 8, positions=("last_q",)), 4)
    for shard in (0, 3, 10, 210):
        for name in (*layout.files_of(shard), *layout.derived_files(shard).values()):
            assert layout.shard_of(name) == shard
    assert layout.shard_of("mlp_out/zarr.json") is None
    assert layout.shard_of("layer/c.0") is None
