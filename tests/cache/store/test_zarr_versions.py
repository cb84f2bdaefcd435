"""The newest zarr, which needs a newer Python than these tests run on, reads what is committed, bit for bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hiddenlake.cache.model import cache_folder

READER = Path(__file__).with_name("zarr_reader.py")
FIXTURES = Path(__file__).with_name("fixtures")
SOURCE = Path(__file__).resolve().parents[3] / "src"
PINS = (
    "zarr==3.4.2", "numcodecs==0.17.1", "xarray==2026.9.0", "numpy==2.5.5", "ml_dtypes==0.6.0", "crc32c==2.9.post0",
    "pyarrow>=16",
)  # fmt: skip


def newer_python():
    """A Python 3.12, or None: from the path, or of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in (shutil.which("python3.12"), *sorted(root.glob("versions/3.12*/bin/python"))):
        if python and subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return python
    return None


@pytest.fixture(scope="module")
def python():
    """Of an environment with the newest zarr, made once under the user's cache folder."""
    newer = newer_python()
    if newer is None:
        pytest.skip("no Python 3.12 was found")
    folder = cache_folder() / "tests" / "zarr-3.4.2"
    python = folder / "bin" / "python"
    if not (folder / ".finished").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([newer, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *PINS]
        installed = subprocess.run(pip, capture_output=True, text=True, check=False)
        if installed.returncode:
            pytest.skip(f"pip could not install zarr 3.4: {installed.stderr[-300:]}")
        (folder / ".finished").touch()
    return python


@pytest.mark.slow
def test_the_newest_zarr_reads_every_fixture(python, tmp_path):
    captures = [shutil.copytree(path, tmp_path / path.name) for path in sorted(FIXTURES.glob("*/*"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.run(
        [python, READER, *captures], env=environment | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["3.4.2", str(len(captures))] and len(captures) >= 3


def test_this_zarr_reads_every_fixture_in_a_process_of_its_own(tmp_path):
    captures = [shutil.copytree(path, tmp_path / path.name) for path in sorted(FIXTURES.glob("*/*"))]
    found = subprocess.run([sys.executable, READER, *captures], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
