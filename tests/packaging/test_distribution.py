"""What is shipped: an sdist, the wheel that is built from it, and what their metadata ask for."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("cache", "probing", "kernels")

# What `import hiddenlake` must work without. Extras may ask for them.
HEAVY = ("torch", "vllm", "cuml", "cupy", "transformers")


def shipped(root: Path) -> set[str]:
    """Every file of the rooms, as it is to be found in the package."""
    files = {
        f"hiddenlake/{path.relative_to(root)}"
        for room in ROOMS
        for path in (root / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return files | {f"hiddenlake/{path.name}" for path in (root / "src" / "hiddenlake").iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path, Path]:
    """(files that should be there, sdist, wheel), built in a copy, the wheel from the sdist."""
    copy = tmp_path_factory.mktemp("build") / "repo"
    others = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo")
    shutil.copytree(REPO, copy, symlinks=True, ignore=others)
    command = [sys.executable, "-m", "build", "--no-isolation", str(copy)]
    subprocess.run(command, cwd=copy.parent, check=True, capture_output=True, text=True)
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (wheel,) = (copy / "dist").glob("*.whl")
    return shipped(copy), sdist, wheel


@pytest.mark.slow
def test_the_sdist_holds_every_file(built: tuple[set[str], Path, Path]) -> None:
    expected, sdist, _ = built
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if "/" in member.name}
    assert {f"src/{name}" for name in expected} <= set(members)
    assert {"LICENSE", "README.md", "pyproject.toml"} <= set(members)
    # A link would point outside the archive.
    assert all(member.isfile() or member.isdir() for member in members.values())


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_no_other(built: tuple[set[str], Path, Path]) -> None:
    expected, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert "hiddenlake/py.typed" in expected and "hiddenlake/cache/spans.py" in expected
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_wheel_asks_for_nothing_heavy(built: tuple[set[str], Path, Path]) -> None:
    with zipfile.ZipFile(built[2]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert base
    assert not [line for line in base if re.match("|".join(HEAVY), line)]
    extras = {"vllm", "transformers", "probes", "cuml", "serve", "client", "otel", "s3", "report", "datasets", "demo", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_the_wheel_works_away_from_the_repo(built: tuple[set[str], Path, Path], tmp_path: Path) -> None:
    expected, _, wheel = built
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in expected
        if name.endswith(".py")
    )
    script = f"""
import importlib.util, pathlib
for name in {modules!r}:
    spec = importlib.util.find_spec(name)
    assert spec is not None and pathlib.Path(spec.origin).is_relative_to({str(target)!r}), (name, spec)
import hiddenlake.cache, hiddenlake.probing, hiddenlake.kernels
from hiddenlake.cache.positions import PAPER
from hiddenlake.probing.tasks import load_task
print(len(PAPER))
"""
    # -P and the folder: nothing of the repo is in the way. PYTHONPATH comes before the editable install.
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr
