"""The commands as a user types them: one pass from capture to picture, bad input, Ctrl-C, two writers at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.store.verify import verify

from ..prepared import ENVIRONMENT


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hiddenlake.cli", *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def run(*arguments: object, status: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with this status."""
    process = start(*arguments)
    out, talk = process.communicate(timeout=600)
    assert process.returncode == status, (process.returncode, out, talk)
    assert "Traceback" not in talk
    return out, talk


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """60 questions. The model is random, so what it calls right is made up: a common letter."""
    path = tmp_path_factory.mktemp("tasks") / "letters.jsonl"
    rows = [{"question": f"Say something {i}", "answers": ["x"], "wrong_answers": ["o", "u"]} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def capture_command(model, task, out, *more) -> list:
    return [
        "capture", "--model", model, "--task", task, "--sites", "mlp_out,resid_post", "--engine", "transformers",
        "--max-new-tokens", 8, "--shard-samples", 8, "--out", out, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def lake(tiny_model, questions, tmp_path_factory) -> Path:
    lake = tmp_path_factory.mktemp("lake")
    out, talk = run(*capture_command(tiny_model, questions, lake / "letters", "--json"))
    summary = json.loads(out)
    assert (summary["committed"], summary["failed"]) == (60, 0)
    assert "60 samples, 0 of them captured before" in talk and "60 samples captured" in talk
    return lake


def test_ls_info_read_verify(lake, tiny_model, tmp_path):
    [entry] = json.loads(run("ls", lake, "--json")[0])
    assert (entry["name"], entry["samples"], entry["sites"]) == ("letters", 60, ["mlp_out", "resid_post"])
    assert "letters" in run("ls", lake)[0]
    facts = json.loads(run("info", lake / "letters", "--json")[0])
    assert facts["identity"]["task"] == "letters" and facts["provenance"][0]["engine"] == "transformers"
    assert "resid_post" in run("info", lake / "letters")[0]

    cell = ["read", lake / "letters", "--site", "mlp_out", "--layer", 1, "--position=-1"]
    table = json.loads(run(*cell, "--rows", 3, "--json")[0])
    assert [row["index"] for row in table] == [0, 1, 2]
    run(*cell, "--out", tmp_path / "cell.npz")
    stored = np.load(tmp_path / "cell.npz")
    opened = hiddenlake.open_capture(lake / "letters")
    assert np.array_equal(stored["activations"], opened.read("mlp_out", 1, "-1"), equal_nan=True)
    assert stored["key"].tolist() == opened.keys

    report = json.loads(run("verify", lake / "letters", "--spot-check", 3, "--model", tiny_model, "--json")[0])
    assert report["ok"] and report["samples"] == 60 and report["spot_check"]["ok"]


def test_probe_and_heatmap(lake, tmp_path):
    grid = tmp_path / "mlp_out.zarr"
    best = json.loads(
        run("probe", lake / "letters", "--site", "mlp_out", "--cv", 2, "--C", "0.01,0.1", "--out", grid)[0]
    )
    opened = hiddenlake.open_grid(grid)
    assert opened.sizes["C"] == 2 and opened.sizes["layer"] == 3
    assert best["auc"] == pytest.approx(float(opened.auc.max()))
    for suffix in ("png", "svg", "pdf"):
        picture = tmp_path / f"map.{suffix}"
        assert run("heatmap", grid, "--out", picture)[0].strip() == str(picture)
        assert picture.stat().st_size > 5000
    assert "expected .svg, .pdf, .png" in run("heatmap", grid, "--out", tmp_path / "map.gif", status=1)[1]
    reference = tmp_path / "reference.csv"
    reference.write_text("layer,last_q,-1\n0,0.6,0.7\n1,0.65,0.75\n")
    run("heatmap", grid, "--compare", reference, "--out", tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 5000


def test_probe_classes(lake, tmp_path):
    keys = hiddenlake.open_capture(lake / "letters").keys
    kinds = tmp_path / "kinds.csv"
    kinds.write_text("key,kind\n" + "".join(f"{key},{'abc'[i % 3]}\n" for i, key in enumerate(keys)))
    run("label", "add", lake / "letters", "kind", kinds)
    command = ["probe-classes", lake / "letters", "--site", "mlp_out", "--label", "kind", "--cv", 2, "--layers", "0-1"]
    grid = tmp_path / "kinds.zarr"
    best = json.loads(run(*command, "--positions=last_q,-1", "--out", grid)[0])
    opened = hiddenlake.open_grid(grid)
    assert opened.auc.shape == (2, 2, 1) and best["auc"] == pytest.approx(float(opened.auc.max()))
    assert list(best["class_auc"]) == opened["class"].values.tolist() == ["a", "b", "c"]
    assert sum(best["class_auc"].values()) / 3 == pytest.approx(best["auc"])
    run(*command, "--multiclass", "ovr", "--classes", "a,b,c", "--out", grid)
    assert hiddenlake.open_grid(grid).attrs["multiclass"] == "ovr"
    two = run(
        "probe", lake / "letters", "--site", "mlp_out", "--label", "kind", "--out", tmp_path / "two.zarr", status=1
    )
    assert "`hiddenlake probe-classes` tell three or more apart" in two[1]


def test_report(lake, tmp_path):
    pytest.importorskip("plotly")
    grid, page = tmp_path / "mlp_out.zarr", tmp_path / "page.html"
    run("probe", lake / "letters", "--site", "mlp_out", "--cv", 2, "--out", grid)
    assert run("report", lake / "letters", "--grid", grid, "--out", page)[0].strip() == str(page)
    best = float(hiddenlake.open_grid(grid).auc.max())
    assert f"with AUC {best:.3f} (95" in page.read_text("utf-8")
    assert "give one of them" in run("report", lake / "letters", "--grid", grid, "--sites", "mlp_out", status=1)[1]
    out, talk = run("report", lake / "letters", "--sites", "resid_post", "--out", tmp_path / "fitted.html")
    # Three layers and the embedding, of the paper's 15 tokens.
    assert "fitting resid_post, 60 cells each" in talk and "60 samples" in talk
    assert "resid_post" in Path(out.strip()).read_text("utf-8")


def test_flipped_byte_is_named_and_never_read(lake, tmp_path):
    import shutil

    damaged = tmp_path / "letters"
    shutil.copytree(lake / "letters", damaged)
    file = damaged / "mlp_out" / "c.0.0.2.0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    out, _ = run("verify", damaged, status=1)
    assert "mlp_out/c.0.0.2.0" in out
    read = ["read", damaged, "--site", "mlp_out", "--out", tmp_path / "all.npz"]
    _, talk = run(*read, status=1)
    assert "mlp_out/c.0.0.2.0" in talk and "byte" in talk


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "a", "answers": ["b"]}\n{"question": \n', "2"),
        ('{"question": "a"}\n', "answers"),
        ("", "no question"),
    ],
)
def test_bad_task_files_are_named_by_line(content, sentence, tiny_model, tmp_path):
    task = tmp_path / "bad.jsonl"
    task.write_text(content)
    _, talk = run(*capture_command(tiny_model, task, tmp_path / "x"), status=1)
    assert "bad.jsonl" in talk and sentence in talk
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--sites", "mlp", "unknown site 'mlp'"),
        ("--layers", "9", "layer 9 does not exist"),
        ("--positions", "middle", "unknown position 'middle'"),
        ("--engine", "jax", "engine 'jax' does not exist"),
        ("--ring-bytes", "lots", "--ring-bytes 'lots' is not a size"),
        ("--engine-options", "{", "is not JSON"),
    ],
)
def test_bad_options_get_a_sentence(option, value, sentence, tiny_model, questions, tmp_path):
    _, talk = run(*capture_command(tiny_model, questions, tmp_path / "x", option, value), status=1)
    assert sentence in talk
    assert not (tmp_path / "x").exists()


def test_a_sample_that_is_too_long_fails_alone_and_shows_in_the_exit_status(tiny_model, tmp_path):
    task = tmp_path / "long.jsonl"
    rows = [{"question": "word " * (300 if i == 1 else 3), "answers": ["e"]} for i in range(3)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, talk = run(*capture_command(tiny_model, task, tmp_path / "x"), status=3)
    assert "2 samples captured" in talk and "1 failed" in talk and "the model's context 256" in talk
    assert json.loads(run("info", tmp_path / "x", "--json")[0])["failures"] == 1


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_ctrl_c_keeps_what_is_complete_and_the_same_command_goes_on(engine, demo_model_folder, tmp_path):
    """SIGINT to the whole group, as a terminal sends it."""
    out = tmp_path / "x"
    command = [
        "capture", "--model", demo_model_folder, "--task", "cities", "--limit", 64, "--layers", "0,29",
        "--max-new-tokens", 12, "--shard-samples", 8, "--engine", engine, "--out", out,
        "--engine-options", '{"batch_size": 8}' if engine == "transformers" else '{"max_num_seqs": 4}',
    ]  # fmt: skip
    process = start(*command)
    deadline = time.monotonic() + 300
    while not list((out / "commits").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 130, talk
    assert "the same command goes on from here" in talk
    kept = hiddenlake.open_capture(out)
    assert 8 <= len(kept) < 64 and verify(out).ok
    _, talk = run(*command)
    assert f"{len(kept)} were there before" in talk
    whole = hiddenlake.open_capture(out)
    assert len(whole) == 64 and verify(out).ok
    assert np.array_equal(
        whole.read("mlp_out", samples=kept.keys).view(np.uint16), kept.read("mlp_out").view(np.uint16)
    )


@pytest.mark.slow
def test_two_writers_share_one_task(tiny_model, questions, tmp_path):
    """The same command twice at once: each sample is captured by one of them."""
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"question": f"Say {i}", "answers": ["e"]}) + "\n" for i in range(300)))
    command = capture_command(tiny_model, many, tmp_path / "x", "--json")
    writers = [start(*command), start(*command)]
    summaries = []
    for writer in writers:
        out, talk = writer.communicate(timeout=300)
        assert writer.returncode == 0, talk
        summaries.append(json.loads(out))
    assert sum(s["committed"] for s in summaries) == 300
    assert all(s["committed"] for s in summaries), "both must have worked"
    opened = hiddenlake.open_capture(tmp_path / "x")
    assert len(opened) == 300 and verify(tmp_path / "x").ok


def test_compat_grid_equals_scikit_learn_on_exported_arrays(lake, tmp_path):
    """compat="llmsknow" on a real capture, cell by cell, against scikit-learn called here on what `read` exports."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import auc, roc_curve
    from sklearn.model_selection import train_test_split

    run(
        "probe",
        lake / "letters",
        "--site",
        "mlp_out",
        "--compat",
        "llmsknow",
        "--seed",
        5,
        "--out",
        tmp_path / "g.zarr",
    )
    run("read", lake / "letters", "--site", "mlp_out", "--out", tmp_path / "all.npz")
    grid = hiddenlake.open_grid(tmp_path / "g.zarr").isel(C=0)
    exported = np.load(tmp_path / "all.npz")
    X, y = exported["activations"], exported["correct"].astype(int)
    valid = hiddenlake.open_capture(lake / "letters").dataset().exact_answer_valid.values
    indices = np.arange(len(y))
    np.random.seed(5)
    np.random.shuffle(indices)
    train, test = train_test_split(indices[:1000], test_size=0.2, random_state=5)
    train, test = train[valid[train]], test[valid[test]]
    last = exported["position"].tolist().index("-1")
    fitted = 0
    for layer in range(X.shape[0]):
        for p, position in enumerate(exported["position"]):
            cell = X[layer, p]
            if position == "exact_answer_after_last":  # the paper clamps to the last token
                cell = np.where(np.isnan(cell), X[layer, last], cell)
            here = ~np.isnan(cell).any(1)
            a, b = train[here[train]], test[here[test]]
            found = float(grid.auc.sel(layer=layer, position=position))
            if len(set(y[a])) < 2 or len(set(y[b])) < 2:
                assert np.isnan(found)
                continue
            model = LogisticRegression(random_state=5).fit(cell[a], y[a])
            rates = roc_curve(y[b], model.predict_proba(cell[b])[:, 0], pos_label=0)
            assert found == pytest.approx(auc(rates[0], rates[1]), abs=1e-6)
            fitted += 1
    assert fitted >= 30


def test_given_pairs_with_every_token_and_pools(tiny_model, tmp_path):
    """prompt and answer from a file, fed as they are; verified, and checked against Hugging Face."""
    rows = [
        {
            "prompt": f"Say {'some ' * i}word",
            "answer": f"A word, number {i}.",
            "correct": i % 2 == 0,
            "exact_answer": "word",
        }
        for i in range(9)
    ]
    task = tmp_path / "pairs.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lake = tmp_path / "lake"
    positions = "last_q,exact_answer_last,mean_answer,max_prompt,mean_all,all"
    run(
        "capture", "--model", tiny_model, "--task", task, "--sites", "resid_post,mlp_act,final_norm", "--positions", positions,
        "--engine", "transformers", "--shard-samples", 4, "--out", lake / "pairs",
    )  # fmt: skip
    opened = hiddenlake.open_capture(lake / "pairs")
    samples = opened.samples().to_pylist()
    assert [s["answer"] for s in samples] == [row["answer"] for row in rows]
    assert [s["correct"] for s in samples] == [row["correct"] for row in rows]
    assert {s["finish_reason"] for s in samples} == {"given"} and all(s["exact_answer_valid"] for s in samples)
    for i, sample in enumerate(samples):
        tokens = opened.read_tokens("resid_post", layer=1, samples=i, dtype="float32").values
        assert (
            len(tokens) == sample["total_length"] and len(sample["logprobs"]) == len(tokens) - sample["prompt_length"]
        )
        q = sample["prompt_length"]
        cell = {name: opened.read("resid_post", 1, name, i, dtype="float32") for name in opened.coverage.positions}
        np.testing.assert_array_equal(cell["last_q"], tokens[q - 1])
        np.testing.assert_array_equal(cell["exact_answer_last"], tokens[sample["token_index"][1]])
        np.testing.assert_array_equal(cell["max_prompt"], tokens[:q].max(0))
        np.testing.assert_allclose(cell["mean_answer"], tokens[q:].mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(cell["mean_all"], tokens.mean(0), rtol=1e-5, atol=1e-5)
    report = json.loads(run("verify", lake / "pairs", "--spot-check", 3, "--model", tiny_model, "--json")[0])
    assert report["ok"] and report["spot_check"]["ok"]
    assert "tokens" in run("info", lake / "pairs")[0]


def test_plain_texts_are_all_prompt(tiny_model, tmp_path):
    task = tmp_path / "texts.csv"
    task.write_text("text\nOnce upon a time\nThere was a king.\n")
    run(
        "capture", "--model", tiny_model, "--task", task, "--positions", "all/2", "--engine", "transformers",
        "--out", tmp_path / "texts",
    )  # fmt: skip
    opened = hiddenlake.open_capture(tmp_path / "texts")
    for i, sample in enumerate(opened.samples().to_pylist()):
        assert (
            sample["correct"] is None and sample["answer"] == "" and sample["total_length"] == sample["prompt_length"]
        )
        assert opened.read_tokens("mlp_out", samples=i).token_index.tolist() == list(
            range(0, sample["total_length"], 2)
        )
    assert verify(tmp_path / "texts").ok


def test_samples_of_one_prompt(tiny_model, questions, tmp_path):
    """Each has a key and a seed of its own and its prompt's group; more are added by asking for more."""

    def capture(samples):
        run(
            "capture", "--model", tiny_model, "--task", questions, "--limit", 3, "--engine", "transformers", "--out",
            tmp_path / "x", "--max-new-tokens", 6, "--temperature", 1.0, "--seed", 4, "--samples", samples,
        )  # fmt: skip
        return {s["key"]: s for s in hiddenlake.open_capture(tmp_path / "x").samples().to_pylist()}

    two, four = capture(2), capture(4)
    assert len(two) == 6 and len(four) == 12 and two.items() <= four.items()
    by_prompt = {}
    for sample in four.values():
        by_prompt.setdefault(sample["index"], []).append(sample)
    for samples in by_prompt.values():
        assert [s["sample_index"] for s in samples] == [0, 1, 2, 3] and len({s["group"] for s in samples}) == 1
        assert len({tuple(s["token_ids"]) for s in samples}) > 1
    _, talk = run(
        "capture", "--model", tiny_model, "--task", questions, "--samples", 3, "--out", tmp_path / "y", status=1
    )
    assert "3 samples a prompt at temperature 0.0" in talk
