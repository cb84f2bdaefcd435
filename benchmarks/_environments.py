"""Environments of rivals: pinned, made once under the user's cache folder, and never half made."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from hiddenlake.cache.model import cache_folder

_PINS = Path(__file__).parent / "requirements"
_TORCH = Path(__file__).parents[1] / "requirements" / "cpu-torch.txt"
_TORCH_CPU = "https://download.pytorch.org/whl/cpu"


def python_of(name: str) -> Path:
    """The Python of the environment that `requirements/<name>.txt` pins, made at the first call (minutes).

    Raises RuntimeError when pip cannot install it.
    """
    pins = _PINS / f"{name}.txt"
    digest = hashlib.sha256(_TORCH.read_bytes() + pins.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / "benchmarks" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / ".finished").exists():
        return python
    # what an interrupted build left cannot be trusted: pip calls a package installed before its last file is there
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment of {name} in {folder}, once", file=sys.stderr)
    _run(sys.executable, "-m", "venv", folder)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    try:
        _run(*pip, "-r", _TORCH)
    except RuntimeError:
        _run(*pip, "-r", _TORCH, "--index-url", _TORCH_CPU)
    _run(*pip, "--ignore-requires-python", "-r", pins)
    (folder / ".finished").touch()
    return python


def pinned(name: str) -> dict[str, str]:
    """{package: version} of the rival itself."""
    package = name.replace("_", "-")
    pins = (_PINS / f"{name}.txt").read_text("utf-8").splitlines()
    return {package: next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{package}=="))}


def _run(*command: str | Path) -> None:
    # stdout is for tables
    if subprocess.run(list(map(str, command)), check=False, stdout=sys.stderr).returncode:
        raise RuntimeError(f"{' '.join(map(str, command[1:4]))} failed: its own message stands above")
