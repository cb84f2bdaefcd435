"""The commands `hiddenlake paper ...` say what was wrong in a sentence, print data to stdout and save it."""

import json
import sys

import pytest

from hiddenlake.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hiddenlake", "paper", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def lake(make_capture, store_capture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    for seed, name in enumerate(("one", "two")):
        data = make_capture(n=120, n_layers=2, positions=("exact_answer_first", "exact_answer_last"), seed=seed)
        data["group"] = "sample", data.group.values + f" of {name}"
        store_capture(data, folder / name, {"model": "m/x", "weights": "1", "task": name})
    return folder


def test_transfer_from_the_shell(run, lake, tmp_path):
    code, out, err = run("transfer", lake / "one", lake / "two", "--out", tmp_path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(row["train"], row["test"]) for row in found["rows"]] == [
        ("one", "one"), ("one", "two"), ("two", "one"), ("two", "two")
    ]  # fmt: skip
    [saved] = tmp_path.glob("*.json")
    assert json.loads(saved.read_text()) == found and str(saved) in err
    [picture] = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000 and str(picture) in err
    code, out, _ = run("transfer", lake / "one", lake / "two", "--out", tmp_path)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5 and lines[0].split()[:3] == ["train", "test", "cell"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("choose", "--compat", "llmknows"), "--compat 'llmknows' does not exist"),
        (("error-types", "--compat", "x"), "--compat 'x' does not exist"),
        (("error-types", "--layer", 3), "--layer and --position name one cell together"),
        (("error-types", "--task", "winobia"), "unknown task 'winobia'"),
    ],
)
def test_bad_input_is_one_sentence(run, winobias, tiny_model, arguments, message):
    command, *rest = arguments
    code, out, err = run(command, "--task", "winobias", "--data", winobias, "--model", tiny_model, *rest)
    assert (code, out) == (1, "") and message in err and err.startswith("error: ")


def test_one_capture_cannot_transfer(run, lake):
    code, _, err = run("transfer", lake / "one")
    assert code == 1 and "expected two or more tasks" in err
