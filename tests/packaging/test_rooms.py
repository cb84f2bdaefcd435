"""The rooms: which module may import which, and that each says what it is for in its first line."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "cache", "probing")  # each may import those before it
MODULES = sorted(
    path.relative_to(REPO)
    for folder in (*ROOMS, "src/hiddenlake")
    for path in (REPO / folder).rglob("*.py")
    if folder in ROOMS or path.parent == REPO / folder
)


def imported(module: Path) -> set[str]:
    """Every module that a file imports, at the top or inside, with names that may be modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((REPO / module).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: import by the full name, hiddenlake.…"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def touches(module: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(module))


def test_there_are_modules() -> None:
    assert Path("cache/spans.py") in MODULES and Path("src/hiddenlake/__init__.py") in MODULES


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_first_line_says_what_the_module_is_for(module: Path) -> None:
    text = (REPO / module).read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and docstring.splitlines()[0].strip()
    assert text.startswith('"""'), "the docstring starts on the first line"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_dependencies_point_one_way(module: Path) -> None:
    room = module.parts[0]
    later = ROOMS[ROOMS.index(room) + 1 :] if room in ROOMS else ()
    for other in later:
        assert not touches(module, f"hiddenlake.{other}")
    if room in ROOMS:
        assert not touches(module, "hiddenlake.cli")
    # By their bare names the folders can be imported in the root of the repo only.
    for other in ROOMS:
        assert not touches(module, other)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_vllm_is_touched_in_two_places(module: Path) -> None:
    rooms = ("cache/worker", "cache/vllm_server")
    allowed = module.match("cache/engines/*vllm*.py") or any(module.is_relative_to(room) for room in rooms)
    assert allowed or not touches(module, "vllm")
