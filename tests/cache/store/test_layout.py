import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.errors import StoreError, UnknownNameError
from hiddenlake.cache.positions import PAPER, Tokens
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ALIGNMENT, ShardFile
from hiddenlake.cache.store.sizes import CHUNK_BYTES, TOKEN_FILE_BYTES, choose_layout


def box(layers, hidden, dtype="bfloat16", positions=PAPER):
    return Coverage(("mlp_out",), tuple(range(layers)), positions, {"mlp_out": hidden}, dtype)


def tokens_of(layers, hidden, dtype="bfloat16", positions=PAPER):
    return dataclasses.replace(box(layers, hidden, dtype), positions=positions, tokens=Tokens("all"))


@pytest.mark.parametrize(("layers", "hidden", "samples"), [(30, 576, 256), (32, 4096, 32), (80, 8192, 16)])
def test_samples_a_shard_of_known_models(layers, hidden, samples):
    assert choose_layout(box(layers, hidden), 10_000, 2 << 30) == Layout(box(layers, hidden), samples)


def test_few_planned_samples_make_a_small_shard():
    assert choose_layout(box(30, 576), 100, 2 << 30).samples == 128


def test_little_memory_makes_a_small_shard_or_an_error_with_numbers():
    assert choose_layout(box(32, 4096), 10_000, 64 << 20).samples == 4
    with pytest.raises(StoreError, match=r"two shard buffers .* take .* MiB, .*may take 0\.0 MiB: allow more"):
        choose_layout(box(32, 4096), 10_000, 1000)


@settings(deadline=None)
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


@pytest.mark.parametrize(
    ("layers", "hidden", "chunk", "shard"), [(30, 576, 256, 1792), (32, 4096, 32, 224), (80, 8192, 16, 48)]
)
def test_tokens_a_shard_of_known_models(layers, hidden, chunk, shard):
    for positions in ((), PAPER):
        layout = choose_layout(tokens_of(layers, hidden, positions=positions), 10_000, 2 << 30)
        assert (layout.chunk_tokens, layout.shard_tokens) == (chunk, shard)
        assert layout.samples == min(64, chunk if positions else 64)
        assert max(file.size for file in layout.token_files.values()) <= TOKEN_FILE_BYTES
        assert layout.token_bytes < 1.02 * 2 * hidden * (layers + 1)


def test_little_memory_makes_small_token_shards_or_an_error_with_numbers():
    layout = choose_layout(tokens_of(32, 4096, positions=()), 10_000, 64 << 20)
    assert (layout.chunk_tokens, layout.shard_tokens, layout.buffer_bytes <= 64 << 20) == (32, 96, True)
    layout = choose_layout(tokens_of(32, 4096, positions=("-1",)), 10_000, 4 << 20)
    assert (layout.chunk_tokens, layout.shard_tokens, layout.samples) == (4, 4, 2)
    with pytest.raises(
        StoreError, match=r"a shard x 32 layers x 1 positions x 1 sites and two shard buffers of 1 tokens"
    ):
        choose_layout(tokens_of(32, 4096, positions=("-1",)), 10_000, 1000)
    with pytest.raises(StoreError, match=r"^two shard buffers of 1 tokens .* take .* MiB, .*may take 0\.0 MiB"):
        choose_layout(tokens_of(32, 4096, positions=()), 10_000, 1000)


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9000), st.sampled_from(["bfloat16", "float32"]), st.booleans(),
    st.integers(18, 32),
)  # fmt: skip
def test_buffers_of_cells_and_tokens_fit_together(layers, hidden, dtype, cells, bits):
    coverage = tokens_of(layers, hidden, dtype, ("last_q", "-1") if cells else ())
    try:
        layout = choose_layout(coverage, 1000, 1 << bits)
    except StoreError:
        assert Layout(coverage, 1, 1, 1).buffer_bytes > 1 << bits
        return
    assert layout.buffer_bytes == 2 * (layout.shard_bytes + layout.token_shard_bytes) <= 1 << bits
    T, K = layout.chunk_tokens, layout.shard_tokens
    assert T & (T - 1) == 0 and K % T == 0
    assert K == T or max(file.size for file in layout.token_files.values()) <= TOKEN_FILE_BYTES


@settings(deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_a_token_file_may_lack_its_last_chunks(data, k, layers, width, layered):
    columns = data.draw(st.integers(1, k))
    file = ShardFile((layers, k) if layered else (k,), 4, width, "bfloat16", columns)
    lengths = np.full(len(file.present), file.chunk_bytes)
    index = np.frombuffer(file.index(lengths)[:-4], "<u8").reshape(-1, 2)
    there = np.flatnonzero(index[:, 0] != 2**64 - 1)
    assert there.tolist() == file.present.tolist()
    assert file.offsets(lengths)[file.place[there]].tolist() == index[there, 0].tolist()
    assert file.size == len(there) * file.pitch + file.index_bytes == file.offsets(lengths)[-1] + file.index_bytes
    assert set(np.flatnonzero(file.place < 0).tolist()) == set(range(len(index))) - set(there.tolist())


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=2), st.integers(1, 300), st.integers(1, 700),
    st.sampled_from(["bfloat16", "float32"]),
)  # fmt: skip
def test_a_shard_file_has_room_for_every_chunk_and_its_checksum(outer, samples, width, dtype):
    file = ShardFile(tuple(outer), samples, width, dtype)
    assert file.pitch % ALIGNMENT == 0 and 4 <= file.pitch - file.chunk_bytes < ALIGNMENT + 4
    lengths = np.full(len(file.present), file.chunk_bytes)
    assert file.size == file.offsets(lengths)[-1] + len(file.index(lengths))
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
        {"dtype": "float64"},
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
    layout = Layout(tokens_of(3, 8), 4, 4, 8)
    for shard in (0, 3, 10, 210):
        for name in layout.token_files_of(shard):
            assert (layout.token_shard_of(name), layout.shard_of(name)) == (shard, None)
        for name in (*layout.files_of(shard), *layout.derived_files(shard).values()):
            assert (layout.token_shard_of(name), layout.shard_of(name)) == (None, shard)
    assert layout.shard_of("mlp_out/zarr.json") is None
    assert layout.token_shard_of("tokens/embed/zarr.json") is None
    assert layout.shard_of("layer/c.0") is None
