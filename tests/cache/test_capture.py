"""The pipeline with the transformers engine and a tiny random model: resume, failures, full disks, refusals."""

import errno
import json

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache import pools
from hiddenlake.cache.capture import run_job
from hiddenlake.cache.errors import BadInputError, CaptureError, IdentityError, StoreError, UnknownNameError
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.store import files
from hiddenlake.cache.store.verify import verify


class Letters:
    """Ten short questions; an answer is right when it has an `e`, which is also its exact answer."""

    name = "letters"
    rules = "letter e 1"

    def __init__(self, n: int = 10, extra: str = "") -> None:
        self.questions = [Question(i, f"Say {'something ' * i}{extra}", ("e",), group=str(i)) for i in range(n)]

    def judge(self, question: Question, answer: str) -> Judgement:
        return Judgement("e" in answer, "e" if "e" in answer else None)


def capture(model, out, task=None, **settings):
    settings = {"sites": ["mlp_out"], "max_new_tokens": 6, "shard_samples": 4, "options": {"batch_size": 4}} | settings
    return hiddenlake.capture(str(model), task or Letters(), out=out, engine="transformers", **settings)


def test_second_run_finds_everything_there(tiny_model, tmp_path):
    first = capture(tiny_model, tmp_path / "x")
    assert (first.planned, first.present, first.committed, first.failed) == (10, 0, 10, 0)
    before = hiddenlake.open_capture(tmp_path / "x").read("mlp_out")
    second = capture(tiny_model, tmp_path / "x")
    assert (second.present, second.committed) == (10, 0)
    assert np.array_equal(before, hiddenlake.open_capture(tmp_path / "x").read("mlp_out"), equal_nan=True)


def test_a_longer_limit_goes_on(tiny_model, tmp_path):
    capture(tiny_model, tmp_path / "x", Letters(3))
    summary = capture(tiny_model, tmp_path / "x", Letters(10))
    assert (summary.present, summary.committed) == (3, 7)
    opened = hiddenlake.open_capture(tmp_path / "x")
    assert opened.samples()["index"].to_pylist() == list(range(10))
    assert verify(tmp_path / "x").ok


def test_prompt_longer_than_the_context_fails_alone(tiny_model, tmp_path):
    task = Letters(6)
    task.questions[2] = Question(2, "word " * 300, ("e",), group="2")
    summary = capture(tiny_model, tmp_path / "x", task)
    assert (summary.committed, summary.failed) == (5, 1)
    [cause] = summary.causes.values()
    assert "tokens, the model's context 256" in cause
    failures = hiddenlake.open_capture(tmp_path / "x").failures().to_pylist()
    assert [(f["index"], f["attempts"]) for f in failures] == [(2, 0)] and failures[0]["cause"] == cause


def test_full_context_leaves_the_last_token_absent_and_says_so(tiny_model, tmp_path):
    task = Letters(1, extra="word " * 200)
    capture(tiny_model, tmp_path / "x", task, max_new_tokens=100)
    [sample] = hiddenlake.open_capture(tmp_path / "x").samples().to_pylist()
    assert sample["total_length"] == 256 and sample["finish_reason"] == "length"
    assert "the context is full" in sample["status"]
    assert sample["token_index"][-1] == -1 and sample["token_index"][-2] == 254


def test_base_model_takes_plain_text(tiny_model, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    capture(base, tmp_path / "x")
    opened = hiddenlake.open_capture(tmp_path / "x")
    assert opened.identity["chat_template"] is None
    assert opened.samples()["prompt"].to_pylist()[1] == "Say something "
    capture(tiny_model, tmp_path / "chat")
    chat = hiddenlake.open_capture(tmp_path / "chat")
    assert chat.samples()["prompt"].to_pylist()[1].endswith("<|im_start|>assistant\n")
    assert not set(opened.keys) & set(chat.keys)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"sites": ["mlp_out", "resid_post"]}, "sites"),
        ({"layers": "0"}, "layers"),
        ({"positions": "-1"}, "positions"),
    ],
)
def test_another_identity_is_refused_naming_the_field(change, field, tiny_model, tmp_path):
    capture(tiny_model, tmp_path / "x", Letters(2))
    with pytest.raises(IdentityError, match=field):
        capture(tiny_model, tmp_path / "x", Letters(2), **change)
    assert len(hiddenlake.open_capture(tmp_path / "x")) == 2


def test_full_disk_before_the_run_is_refused(tiny_model, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="the disk is too full: 10 samples need"):
        capture(tiny_model, tmp_path / "x")


def test_full_disk_during_the_run_loses_nothing(tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "x"
    write = files.os.write
    shards = []

    def full(descriptor, data):
        path = files.os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(f"{out}/mlp_out/"):
            shards.append(path)
            if len(shards) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(StoreError, match="(?i)no space|full"):
        capture(tiny_model, out)
    kept = hiddenlake.open_capture(out)
    assert len(kept) == 4 and verify(out).ok
    before = dict(zip(kept.keys, np.moveaxis(kept.read("mlp_out"), 2, 0), strict=True))
    monkeypatch.undo()
    assert capture(tiny_model, out).committed == 6
    after = hiddenlake.open_capture(out)
    for key, rows in before.items():
        assert np.array_equal(after.read("mlp_out", samples=[key])[:, :, 0], rows, equal_nan=True)
    assert len(after) == 10 and verify(out).ok


def test_a_sample_that_cannot_be_stored_is_tried_twice_and_recorded(tiny_model, tmp_path, monkeypatch):
    """An activation that is not finite must never be stored; the other samples go on."""
    from hiddenlake.cache.engines.transformers import TransformersEngine

    job = plan_job(tiny_model, Letters(6), sites=["mlp_out"], max_new_tokens=6, options={"batch_size": 3})
    bad = job.prompts[4].key
    step = TransformersEngine.step
    tries = []

    def overflow(self):
        done = step(self)
        if bad in self._rows:
            tries.append(1)
            block = self.table.blocks[0]
            self._rows[bad][1][:, block.layer_offset(1)] = np.inf
        return done

    monkeypatch.setattr(TransformersEngine, "step", overflow)
    summary = run_job(job, out=tmp_path / "x", engine="transformers")
    assert (summary.committed, summary.failed, len(tries)) == (5, 1, 2)
    assert "mlp_out of layer 1 is not finite" in summary.causes[bad]
    [failure] = hiddenlake.open_capture(tmp_path / "x").failures().to_pylist()
    assert (failure["key"], failure["attempts"]) == (bad, 2)
    monkeypatch.undo()
    assert run_job(job, out=tmp_path / "x", engine="transformers").committed == 1
    assert hiddenlake.open_capture(tmp_path / "x").failures().num_rows == 0


def test_another_tokens_row_is_refused(tiny_model, tmp_path, monkeypatch):
    """The embedding in a row must be that of the token that the answer has there."""
    from hiddenlake.cache.engines.transformers import TransformersEngine

    step = TransformersEngine.step

    def shifted(self):
        done = step(self)
        for key, (row_of, rows, pools) in self._rows.items():
            self._rows[key] = row_of, np.roll(rows, 1, axis=0), pools
        return done

    monkeypatch.setattr(TransformersEngine, "step", shifted)
    summary = capture(tiny_model, tmp_path / "x", Letters(3))
    assert summary.committed == 0 and summary.failed == 3
    assert all("another token's activation" in cause for cause in summary.causes.values())


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"sites": ["mlp"]}, UnknownNameError, "unknown site 'mlp'"),
        ({"layers": "3"}, UnknownNameError, "layer 3 does not exist: the model has 3 layers, 0 to 2"),
        ({"positions": "middle"}, UnknownNameError, "unknown position 'middle'"),
        ({"dtype": "float64"}, BadInputError, "dtype float64 cannot be stored"),
        ({"max_new_tokens": 0}, BadInputError, "max_new_tokens is 0"),
        ({"ring_bytes": 1000}, CaptureError, "--ring-bytes 1000 is too small"),
        ({"buffer_bytes": 1000}, StoreError, "buffer"),
    ],
)
def test_bad_arguments_get_a_sentence(settings, error, sentence, tiny_model, tmp_path):
    with pytest.raises(error, match=sentence):
        capture(tiny_model, tmp_path / "x", Letters(2), **settings)


def test_unknown_models_get_a_sentence(tmp_path, tiny_model):
    with pytest.raises(BadInputError, match="could not be read"):
        capture(tmp_path / "nowhere", tmp_path / "x")
    other = tmp_path / "bloom"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(UnknownNameError, match="BloomForCausalLM is not supported: expected one of .*LlamaForCausalLM"):
        capture(other, tmp_path / "x")


def test_estimate_is_close_to_what_is_written(tiny_model, tmp_path):
    from hiddenlake.cache.capture import Watcher

    class Keep(Watcher):
        def planned(self, cost, summary):
            self.cost = cost

    keep = Keep()
    summary = capture(tiny_model, tmp_path / "x", watcher=keep)
    assert summary.bytes == pytest.approx(keep.cost.disk_bytes, rel=0.1)
    assert keep.cost.samples == 10


def test_spot_check_agrees_and_refuses_another_model(tiny_model, tmp_path):
    from hiddenlake.cache.spot_check import spot_check

    capture(tiny_model, tmp_path / "x")
    opened = hiddenlake.open_capture(tmp_path / "x")
    found = spot_check(opened, tiny_model, 4)
    assert found.ok and found.samples == 4 and found.worst < 1e-4
    with pytest.raises(IdentityError, match="was made with"):
        spot_check(opened, hiddenlake.demo_model(), 2)


def test_without_transformers_the_error_says_what_to_install(tiny_model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CaptureError, match=r"install `hiddenlake\[vllm\]` or `hiddenlake\[transformers\]`"):
        capture(tiny_model, tmp_path / "x")


def test_early_positions_keep_few_rows_and_the_same_numbers(tiny_model, tmp_path):
    """Where no position waits for the end of the answer, only the rows that it names are kept."""
    from hiddenlake.cache.engines.transformers import TransformersEngine

    names = "last_q,first_answer,second_answer"
    request = plan_job(tiny_model, Letters(1), sites=["mlp_out"], positions=names).request
    assert request.rows_per_sample == 3
    assert TransformersEngine(request)._wanted(10, 40) == [9, 10, 11]
    capture(tiny_model, tmp_path / "few", positions=names)
    capture(tiny_model, tmp_path / "all")
    few, whole = (hiddenlake.open_capture(tmp_path / name) for name in ("few", "all"))
    for name in names.split(","):
        found, expected = few.read("mlp_out", position=name), whole.read("mlp_out", position=name)
        assert np.allclose(found, expected, atol=1e-6, equal_nan=True)


def test_long_samples_are_stored_in_parts(tiny_model, tmp_path, monkeypatch):
    """A sample whose rows are more than one block of memory is stored as if they were one."""
    positions = ["last_q", "-1", "mean_all", "max_answer", "mean_prompt", "all"]
    capture(tiny_model, tmp_path / "whole", Letters(6), positions=positions)
    monkeypatch.setattr(pools, "_BLOCK", 1)  # one row at a time
    capture(tiny_model, tmp_path / "parts", Letters(6), positions=positions)
    whole, parts = (hiddenlake.open_capture(tmp_path / name) for name in ("whole", "parts"))
    assert np.array_equal(whole.read("mlp_out"), parts.read("mlp_out"), equal_nan=True)
    for i in range(6):
        assert np.array_equal(
            whole.read_tokens("mlp_out", samples=i).values, parts.read_tokens("mlp_out", samples=i).values
        )
