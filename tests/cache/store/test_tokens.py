"""Token-level data: what is written is read back, by every reader and whatever else lies on the token axis."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError, StoreError, UnknownNameError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.store import Coverage, open_capture, opened
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.verify import verify

SAMPLES = 19
EVERY_SITE = ("attn_z", "resid_post", "mlp_act", "final_norm")


@pytest.fixture(
    scope="module",
    params=[("bfloat16", "all", True), ("float32", "all_generated/3", True), ("bfloat16", "all_prompt", False)],
    ids=["all", "generated-float32", "prompt-alone"],
)
def capture(request, tiny, tmp_path_factory):
    dtype, tokens, cells = request.param
    positions = tiny.POSITIONS if cells else ()
    coverage = tiny.coverage(dtype, EVERY_SITE, positions, Tokens.parse(tokens))
    path = tmp_path_factory.mktemp("lake") / "numbers"
    # Three writers in turn, so that there are holes: each leaves the rest of its last token shard.
    for samples in (5, 12, SAMPLES):
        tiny.write(path, samples, coverage=coverage)
    return open_capture(path)


@pytest.fixture(scope="module")
def truth(capture, tiny):
    """Of each sample: site -> bits (layer, token, width) or (token, width)."""
    return [tiny.tokens(i, capture.coverage) for i in range(SAMPLES)]


def as_bytes(array):
    return np.ascontiguousarray(array).tobytes()


def test_everything_is_read_back_and_verified(capture, assert_holds):
    assert_holds(capture.path, complete=SAMPLES)
    report = verify(capture.path)
    assert report.ok and report.bytes == capture.nbytes, report.problems
    spans = [span for commit in capture.commits for span in commit.spans if span and span[1]]
    used = sum(length for _, length in spans)
    assert max(start + length for start, length in spans) > used, "no hole"


def test_zarr_and_tensorstore_read_the_same_bits(capture, truth):
    import zarr

    tensorstore = pytest.importorskip("tensorstore")
    group = zarr.open(capture.path, mode="r")
    slots = capture.snapshot.shard * capture.shard_samples + capture.snapshot.slot
    starts = group["tokens/sample_start"][...][slots]
    lengths = group["tokens/sample_length"][...][slots]
    assert lengths.tolist() == [len(one["embed"]) for one in truth]
    assert (group["tokens/sample_length"][...].sum(), (starts >= 0).sum()) == (lengths.sum(), (lengths > 0).sum())
    tokens = capture.coverage.tokens
    assert dict(group["tokens"].attrs) == {"part": tokens.part, "every": tokens.every}
    for site in capture.coverage.widths:
        array = group[f"tokens/{site}"]
        stored = array[...]
        last = {"attn_z": "d_attn", "mlp_act": "d_mlp"}.get(site, "hidden")
        names = (*(("layer",) if stored.ndim == 3 else ()), "token", last)
        assert array.metadata.dimension_names == names
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{capture.path}/tokens/{site}"}}
        again = tensorstore.open(spec).result().read().result()
        assert as_bytes(again) == as_bytes(stored)
        there = np.zeros(stored.shape[-2], bool)
        for start, length, one in zip(starts, lengths, truth, strict=True):
            assert as_bytes(stored[..., start : start + length, :]) == as_bytes(one[site])
            there[start : start + length] = length > 0
        # Nothing but committed samples was ever written here.
        assert np.isnan(stored[..., ~there, :].astype(np.float32)).all()


def test_xarray_opens_the_tree(capture):
    import xarray

    tree = xarray.open_datatree(capture.path, engine="zarr")
    tokens = tree["tokens"]
    assert tokens["attn_z"].dims == ("layer", "token", "d_attn")
    assert tokens["layer"].values.tolist() == list(capture.coverage.layers)
    start, length = (int(tokens[name].sel(sample=capture.keys[7])) for name in ("sample_start", "sample_length"))
    rows = tokens["attn_z"].sel(layer=2).isel(token=slice(start, start + length))
    assert as_bytes(rows.values) == as_bytes(capture.read_tokens("attn_z", 2, capture.keys[7]).values)


def pick(values):
    return st.none() | st.sampled_from(values) | st.lists(st.sampled_from(values), max_size=5)


numbers = st.none() | st.integers(-30, 30)


@settings(deadline=None)  # the disk is shared
@given(st.data())
def test_any_selection_reads_what_numpy_selects(capture, truth, data):
    c = capture.coverage
    site = data.draw(st.sampled_from([*c.sites, "embed"]))
    layered = truth[0][site].ndim == 3
    layer = data.draw(pick(c.layers)) if layered else None
    samples = data.draw(pick([*range(SAMPLES), *capture.keys]))
    part = data.draw(st.none() | st.builds(slice, numbers, numbers, st.sampled_from([None, 1, 2, -1])))
    check = data.draw(st.booleans())
    if data.draw(st.booleans()):
        opened._arrays.clear()
    number = {key: i for i, key in enumerate(capture.keys)}
    chosen = list(range(SAMPLES)) if samples is None else samples if isinstance(samples, list) else [samples]
    want = [truth[number.get(s, s)][site] for s in chosen]
    want = [one if part is None else one[..., part, :] for one in want]
    empty = truth[0][site][..., :0, :]
    lengths = [one.shape[-2] for one in want]
    want = np.concatenate([empty, *want], axis=-2)
    if layered and layer is not None:
        places = [c.layers.index(k) for k in (layer if isinstance(layer, list) else [layer])]
        want = want[places] if isinstance(layer, list) else want[places[0]]
    got = capture.read_tokens(site, layer, samples, part, check=check)
    assert got.values.shape == want.shape and as_bytes(got.values) == as_bytes(want)
    assert got.lengths.tolist() == lengths and got.offsets[-1] == len(got.token_index) == sum(lengths)


def test_token_index_says_which_token_it_is(capture, tiny):
    found = capture.read_tokens("embed", tokens=slice(1, None))
    for i in range(SAMPLES):
        one = tiny.sample(i)
        indices = capture.coverage.tokens.indices(one.prompt_length, one.total_length)[1:]
        assert found.token_index[found.offsets[i] : found.offsets[i + 1]].tolist() == list(indices)
    assert found.token_index.dtype == np.int32 and found.offsets.dtype == np.int64
    wide = capture.read_tokens("embed", dtype="float32").values
    assert wide.dtype == np.float32 and np.array_equal(wide, capture.read_tokens("embed").values.astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("mlp_out",), "attn_z, resid_post, mlp_act, final_norm, embed"),
        (("attn_z", 1), "0, 2, 5"),
        (("embed", 0), "no layers"),
        (("attn_z", 0, "key-9999"), "key-0000"),
        (("attn_z", 0, -1), "19 samples"),
        (("attn_z", 0, None, None, "float16"), "stored"),
    ],
)
def test_what_was_not_captured_is_an_error_that_says_what_was(capture, arguments, named):
    with pytest.raises(UnknownNameError, match=named):
        capture.read_tokens(*arguments)


def test_cells_and_tokens_are_not_taken_for_each_other(capture, tiny, tmp_path):
    if capture.coverage.positions:
        with pytest.raises(UnknownNameError, match=r"no position 'first_answer'.*read_tokens"):
            capture.read("attn_z", position="first_answer")
    else:
        with pytest.raises(UnknownNameError, match="only tokens .*read_tokens"):
            capture.read("attn_z")
        with pytest.raises(BadInputError, match="tokens=True"):
            capture.dataset()
    tiny.write(tmp_path / "cells", 2)
    cells = open_capture(tmp_path / "cells")
    with pytest.raises(UnknownNameError, match=r"only positions \(last_q, .*use `read`"):
        cells.read_tokens("mlp_out")
    with pytest.raises(BadInputError, match=r"take dataset\(\)"):
        cells.dataset(tokens=True)


def test_dataset_of_tokens(capture, tiny, truth):
    data = capture.dataset(tokens=True)
    assert data["attn_z"].dims == ("layer", "token", "d_attn") and data["final_norm"].dims == ("token", "hidden")
    assert data["attn_z"].dtype == np.float32 and data["sample"].values.tolist() == capture.keys
    assert data.sizes["token"] == sum(len(one["embed"]) for one in truth)
    for i in range(SAMPLES):
        one = data.isel(sample=i)
        start, length = one["sample_start"].item(), one["sample_length"].item()
        rows, sample = data.isel(token=slice(start, start + length)), tiny.sample(i)
        indices = list(capture.coverage.tokens.indices(sample.prompt_length, sample.total_length))
        assert rows["token_index"].values.tolist() == indices and length == len(truth[i]["embed"])
        assert rows["token_id"].values.tolist() == [sample.token_ids[k] for k in indices]
        assert rows["in_answer"].values.tolist() == [k >= sample.prompt_length for k in indices]
        assert set(rows["sample_key"].values) <= {tiny.key(i)} and set(rows["sample_row"].values) <= {i}
        assert one["prompt"].item() == sample.prompt and one["correct"].item() == sample.correct
    inside = data["attn_z"].sel(layer=5)[data["in_answer"].values]
    assert np.array_equal(inside.values, data["attn_z"].values[2][data["in_answer"].values])


@pytest.mark.parametrize(
    "select",
    [
        lambda a: a.sel(layer=2).isel(token=slice(None, None, -3)),
        lambda a: a.isel(layer=[2, 0], token=[5, 1, 1], hidden=slice(3, 9)),
        lambda a: a.isel(token=-2),
        lambda a: a.isel(token=a["in_answer"].values & (a["sample_row"].values > 4)),
    ],
)
def test_lazy_selection_equals_selecting_in_memory(capture, select):
    data = capture.dataset(tokens=True)["resid_post"]
    assert select(data).identical(select(data.copy(deep=True).load()))


def test_an_empty_capture_reads_as_empty(tiny, tmp_path):
    tiny.open_tiny(tmp_path / "c", 4, coverage=tiny.coverage(tokens=Tokens("all"))).close()
    capture = open_capture(tmp_path / "c")
    found = capture.read_tokens("mlp_out", 0)
    assert found.values.shape == (0, tiny.WIDTH) and found.offsets.tolist() == [0] and not len(found.lengths)
    assert capture.dataset(tokens=True)["mlp_out"].shape == (3, 0, tiny.WIDTH)
    assert verify(capture.path).ok


def test_captures_without_tokens_are_what_they_were(tiny, tmp_path):
    """No field betrays that this hiddenlake knows of tokens."""
    tiny.write(tmp_path / "cells", 2)
    tiny.write(tmp_path / "both", 2, coverage=tiny.coverage(tokens=Tokens("all", 2)))
    cells, both = (
        json.loads((tmp_path / name / "zarr.json").read_text())["attributes"]["hiddenlake"]
        for name in ("cells", "both")
    )
    assert set(both) - set(cells) == {"chunk_tokens", "shard_tokens"}
    assert set(both["coverage"]) - set(cells["coverage"]) == {"tokens"} and both["coverage"]["tokens"] == "all/2"
    assert not {"spans", "token_shards"} & set(json.loads((tmp_path / "cells" / "commits" / "0.json").read_text()))
    assert Coverage.from_json(cells["coverage"]) == tiny.coverage() != Coverage.from_json(both["coverage"])
    assert Coverage.from_json(both["coverage"]) == tiny.coverage(tokens=Tokens("all", 2))


def test_coverage_needs_positions_or_tokens(tiny):
    with pytest.raises(ValueError, match="neither positions nor tokens"):
        tiny.coverage(positions=())
    coverage = tiny.coverage(positions=(), tokens=Tokens("all_prompt", 8))
    assert Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage
    assert hash(coverage) != hash(dataclasses.replace(coverage, tokens=Tokens("all_prompt")))
    for sizes in ((0, 0), (4, 6), (4, 0)):
        with pytest.raises(ValueError, match="multiple of the chunk"):
            Layout(coverage, 4, *sizes)
    with pytest.raises(ValueError, match="0 where it has none"):
        Layout(tiny.coverage(), 4, 4, 8)


def test_another_token_coverage_is_refused(tiny, tmp_path):
    from hiddenlake.cache.errors import IdentityError

    tiny.write(tmp_path / "c", 2, coverage=tiny.coverage(tokens=Tokens("all", 2)))
    with pytest.raises(IdentityError, match=r'coverage\.tokens is "all/2" there and "all" here'):
        tiny.open_tiny(tmp_path / "c", 2, coverage=tiny.coverage(tokens=Tokens("all")))
    with pytest.raises(IdentityError, match=r'coverage\.tokens is "all/2" there and absent here'):
        tiny.open_tiny(tmp_path / "c", 2)
    with pytest.raises(StoreError, match="holds no tokens"), tiny.open_tiny(tmp_path / "d", 2) as writer:
        writer.span(3)
