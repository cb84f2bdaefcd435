"""Sites without layers and of every width, and positions that are pooled over a span."""

import dataclasses

import numpy as np
import pytest

from hiddenlake.cache.errors import CaptureError, UnknownNameError
from hiddenlake.cache.positions import ABSENT, POOLED, in_answer
from hiddenlake.cache.store import Coverage, open_capture
from hiddenlake.cache.store.verify import verify

SAMPLES = 10
SITES = ("attn_z", "resid_post", "mlp_act", "final_norm")
POSITIONS = ("mean_answer", "last_q", "max_prompt", "max_exact_answer", "-1")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def capture(request, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES, coverage=tiny.coverage(request.param, SITES, POSITIONS))
    return open_capture(path)


def test_every_reader_gives_what_was_written(capture, expected, assert_holds):
    import zarr

    assert_holds(capture.path, complete=SAMPLES)
    assert verify(capture.path).ok
    slots = capture.snapshot.shard * capture.shard_samples + capture.snapshot.slot
    group = zarr.open(capture.path, mode="r")
    data = capture.dataset()
    for site, bits in expected(SAMPLES, capture.coverage).items():
        assert np.ascontiguousarray(group[site][...][..., slots, :]).tobytes() == np.ascontiguousarray(bits).tobytes()
        assert np.array_equal(data[site].values, capture.read(site, dtype="float32"), equal_nan=True)
        outer = ("position", "sample") if site in ("final_norm", "embed") else ("layer", "position", "sample")
        last = {"attn_z": "d_attn", "mlp_act": "d_mlp"}.get(site, "hidden")
        assert data[site].dims == (*outer, last) == tuple(group[site].metadata.dimension_names)


def test_a_pooled_position_is_there_and_is_no_token(capture, tiny):
    data = capture.dataset()
    index = data["token_index"]
    answered = (data["total_length"] > data["prompt_length"]).values
    assert not answered.all() and answered.any()
    assert np.array_equal(index.sel(position="mean_answer").values, np.where(answered, POOLED, ABSENT))
    exact = data["exact_answer_valid"].values
    assert np.array_equal(index.sel(position="max_exact_answer").values, np.where(exact, POOLED, ABSENT))
    inside = data["in_answer"].sel(position=["mean_answer", "max_prompt", "max_exact_answer"]).values
    assert inside.tolist() == [answered.tolist(), [False] * SAMPLES, exact.tolist()]
    assert np.array_equal(data["in_answer"], in_answer(POSITIONS, index.values, data["prompt_length"].values))
    assert bool((data["attn_z"].isnull().all("d_attn") == (index == ABSENT)).all())
    assert [tuple(row) for row in capture.samples()["token_index"].to_pylist()] == [
        tiny.sample(i, POSITIONS).token_index for i in range(SAMPLES)
    ]


def test_a_site_without_layers_may_stand_alone(tiny, tmp_path, assert_holds):
    import xarray
    import zarr

    coverage = tiny.coverage(sites=("final_norm",))
    assert coverage.layers == ()
    tiny.write(tmp_path / "c", 6, coverage=coverage)
    capture = assert_holds(tmp_path / "c", complete=6)
    assert "layer" not in zarr.open(tmp_path / "c", mode="r")
    data = capture.dataset()
    assert data["final_norm"].dims == ("position", "sample", "hidden") and "layer" not in data.coords
    assert xarray.open_zarr(tmp_path / "c")["final_norm"].shape == (4, 8, tiny.WIDTH)
    with pytest.raises(UnknownNameError, match="no layers"):
        capture.read("final_norm", layer=0)
    assert verify(tmp_path / "c").ok
    tiny.open_tiny(tmp_path / "c", 6, coverage=dataclasses.replace(coverage, layers=(0, 1))).close()


def test_widths_are_by_kind():
    with pytest.raises(ValueError, match="embed may be left out beside"):
        Coverage(("mlp_act",), (0,), ("-1",), {"mlp_act": 8})
    assert Coverage(("mlp_act", "mlp_out"), (0,), ("-1",), {"mlp_act": 8, "mlp_out": 4}).widths["embed"] == 4
    with pytest.raises(ValueError, match="one positive width"):
        Coverage(("mlp_in", "mlp_out"), (0,), ("-1",), {"mlp_in": 8, "mlp_out": 4})


@pytest.mark.parametrize(
    ("position", "index"), [("last_q", POOLED), ("last_q", 99), ("mean_answer", 0), ("mean_answer", 5), ("-1", -3)]
)
def test_an_index_that_a_position_cannot_have_is_refused(tiny, tmp_path, position, index):
    with tiny.open_tiny(tmp_path / "c", 4, coverage=tiny.coverage(positions=POSITIONS)) as writer:
        writer.reserve([tiny.key(0)], 1)
        shard, slot = writer.slot()
        sample = tiny.sample(0, POSITIONS)
        wrong = list(sample.token_index)
        wrong[POSITIONS.index(position)] = index
        with pytest.raises(ValueError, match=f"token_index of {position} is {index}"):
            writer.add(shard, slot, dataclasses.replace(sample, token_index=tuple(wrong)))


def test_a_pooled_cell_must_be_finite(tiny, tmp_path):
    coverage = tiny.coverage(positions=POSITIONS)
    with tiny.open_tiny(tmp_path / "c", 4, coverage=coverage) as writer:
        writer.reserve([tiny.key(1)], 1)
        shard, slot = writer.slot()
        for site, cells in tiny.rows(1, coverage).items():
            shard.views[site][..., slot, :] = cells
        shard.views["mlp_out"][1, 0, slot] = 0x7FC0
        with pytest.raises(CaptureError, match=r"layer 2, position mean_answer is not finite \(1 of 15 cells\)"):
            writer.add(shard, slot, tiny.sample(1, POSITIONS))
