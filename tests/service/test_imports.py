"""What the service never does: run what it reads, import what it does not need, or talk to anybody unasked."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# A file for torch is what a user asks for by name; tests of a backend send it to other processes.
ASKED = {REPO / "cache" / "exchange" / "torch.py", *(REPO / "cache" / "testing").rglob("*.py")}
SOURCES = sorted({*(REPO / "cache").rglob("*.py"), *(REPO / "probing").rglob("*.py")})

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "code",
    "runpy",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "torch.load",
    "torch.save",
    "input",
}


def name_of(node):
    """`a.b.c` of a chain of attributes."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def forbidden(tree):
    """What a source does that would run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in CALLS:
                yield f"line {node.lineno}: {name}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell", "weights_only"):
                    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
                    if value is not (keyword.arg == "weights_only"):
                        yield f"line {node.lineno}: {name}({keyword.arg}={value})"


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "import a, yaml", "eval('1')", "x = torch.load(f)", "np.load(f, allow_pickle=True)",
     "subprocess.run(c, shell=True)", "AutoModel.from_pretrained(m, trust_remote_code=ask)", "torch.load(f, weights_only=False)"],
)  # fmt: skip
def test_the_rule_finds_what_it_is_for(source):
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_that_is_read_is_run(path):
    if path not in ASKED:
        assert not list(forbidden(ast.parse(path.read_text())))


def test_the_exceptions_are_there():
    assert len(SOURCES) > 100 and set(SOURCES) >= ASKED


def test_numpy_is_told_not_to_unpickle():
    """Its own default may change."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name_of(node.func) in ("np.load", "numpy.load"):
                assert "allow_pickle" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"


def run(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SERVE = """
import json, sys, threading
connected = []
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        connected.append([event, str(arguments[1:])])
sys.addaudithook(audit)
from starlette.testclient import TestClient
from hiddenlake.cache.service.app import make_app
from hiddenlake.cache.service import serving, connection
from hiddenlake.cache.service.settings import load_settings
parts = serving.make_parts(sys.argv[1], load_settings()[0])
with TestClient(make_app(parts), "http://127.0.0.1", headers={"Authorization": "Bearer " + parts.keys.add("x")}) as client:
    for ask in ("/v1/captures", "/v1/captures/cells/samples", "/v1/captures/cells/tokens?id=3", "/openapi.json", "/metrics"):
        assert client.get(ask).status_code == 200
    body = {"capture": "cells", "site": "embed"}
    assert client.post("/v1/activations:read", json=body).status_code == 200
heavy = ("torch", "vllm", "transformers", "sklearn", "scipy", "matplotlib", "zarr", "cupy", "plotly", "jinja2")
print(json.dumps([[name for name in heavy if name in sys.modules], connected]))
"""


def test_serving_imports_nothing_heavy_and_asks_nobody(written_lake, lake):
    heavy, connected = run(SERVE, str(lake))
    assert heavy == [] and connected == []


def test_torch_is_not_needed(lake):
    """Not even there."""
    heavy, _ = run(
        "import sys\nfor name in ('torch', 'vllm', 'transformers'): sys.modules[name] = None\n"
        + SERVE.replace('"torch", "vllm", "transformers", ', ""),
        str(lake),
    )
    assert heavy == []
