"""Settings: each is documented, can be given in three ways, of which the stronger counts, and is read somewhere."""

import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.service.settings import PREFIX, Settings, load_settings, of_command

from .conftest import hiddenlake

REPO = Path(__file__).resolve().parents[2]
NAMES = list(Settings.model_fields)
COMMANDS = ("serve", "worker", "up")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith(PREFIX) and name[len(PREFIX) :].lower() in NAMES]:
        monkeypatch.delenv(name)


def other(name, number=1):
    """A value that is not the default: (as text, as it is loaded)."""
    field, default = Settings.model_fields[name], Settings.model_fields[name].default
    choices = {
        "host": ["127.0.0.2", "127.0.0.3", "127.0.0.4"], "log_level": ["debug", "warning", "error"],
        "engine": ["transformers"] * 3, "engine_options": ['{"a": 1}', '{"b": [2]}', '{"c": {}}'],
        "sites": ["embed", "mlp_in", "resid_pre"], "layers": ["1", "2", "3"], "dtype": ["bfloat16", "float16", "float32"],
        "traces": ["http://a", "http://b", "https://c"],
    }  # fmt: skip
    if name in choices:
        text = choices[name][number - 1]
        return text, json.loads(text) if name == "engine_options" else text
    if "ByteSize" in str(field.annotation):
        return f"{number}MiB", number << 20
    if isinstance(default, float):
        return f"{number}.5", number + 0.5
    return str(number), number


@lru_cache
def help_of(command):
    done = hiddenlake(command, "--help", COLUMNS="300", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented(name):
    field = Settings.model_fields[name]
    assert len(field.description) > 20 and field.description.endswith(".")
    assert field.json_schema_extra["commands"] and set(field.json_schema_extra["commands"]) <= {"serve", "worker"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_flag_where_it_counts_and_nowhere_else(command):
    text = help_of(command)
    for name in NAMES:
        flag = f"--{name.replace('_', '-')}"
        there = re.search(rf"{flag}\b(?!-)", text) is not None
        assert there == (name in of_command(command)), (command, flag)
        if there:
            start = Settings.model_fields[name].description[:30]
            assert start in " ".join(text.split()), (command, flag)


def test_the_command_lists_all_with_their_sources(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("max_rows = 7\nport = 1\n")
    done = hiddenlake("settings", "--config", file, "--json", HIDDENLAKE_PORT="2")
    rows = {row["variable"]: row for row in json.loads(done.stdout)}
    assert list(rows) == [f"{PREFIX}{name.upper()}" for name in NAMES]
    assert (rows["HIDDENLAKE_PORT"]["value"], rows["HIDDENLAKE_PORT"]["from"]) == ("2", "variable")
    assert (rows["HIDDENLAKE_MAX_ROWS"]["value"], rows["HIDDENLAKE_MAX_ROWS"]["from"]) == ("7", "file")
    assert rows["HIDDENLAKE_HOST"]["from"] == "default" and all(row["help"] for row in rows.values())
    assert "--max-rows" in hiddenlake("settings", "--config", file).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_before_a_variable_before_the_file_before_the_default(name, monkeypatch, tmp_path):
    file = tmp_path / "settings.toml"
    text, in_file = other(name, 3)
    bare = name == "engine_options" or isinstance(in_file, float) or (isinstance(in_file, int) and text.isdigit())
    file.write_text(f"{name} = {text.replace(':', ' =') if bare else json.dumps(text)}\n")
    (flag, by_flag), (variable, by_variable) = other(name, 1), other(name, 2)
    flags = {name: by_flag if name == "engine_options" else flag}

    def found(flags=None, file=None):
        settings, sources = load_settings(flags, file)
        assert {n for n, source in sources.items() if source != "default"} <= {name}
        return getattr(settings, name), sources[name]

    assert found() == (Settings.model_fields[name].default, "default")
    assert found(file=file) == (in_file, "file")
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", variable)
    assert found(file=file) == (by_variable, "variable")
    assert found(flags, file) == (by_flag, "flag")
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", "")
    assert found(file=file) == (in_file, "file")


def said(*arguments, **more):
    with pytest.raises(BadInputError) as error:
        load_settings(*arguments, **more)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


BAD = {
    "port": ["x", "-1", "65536", "1.5"], "max_body": ["0", "-1", "much", "1 ZB"], "max_wait": ["nan", "inf", "0", "-1", "x"],
    "drain": ["inf", "1e999"], "log_level": ["loud", "INFO", "info\n"], "engine": ["sglang"], "max_rows": ["0"],
    "attempts": ["0", "1.5"], "quota": ["x"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_said_with_where_it_comes_from(name, value, monkeypatch, tmp_path):
    assert f"--{name.replace('_', '-')}" in said({name: value})
    file = tmp_path / "settings.toml"
    file.write_text(f"{name} = {json.dumps(value)}\n")
    text = said(None, file)
    assert str(file) in text and name in text
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
    assert f"{PREFIX}{name.upper()}" in said()
    assert f"{PREFIX}{name.upper()}" in said(None, None)


@pytest.mark.parametrize(
    "content", ["max_row = 1", "[serve]\nport = 1", "port = ", "=", "\x00", "port = 1\nport = 2", "host = 1979-05-27", "PORT = 1", "port = true"]
)  # fmt: skip
def test_a_file_that_is_none(tmp_path, content):
    file = tmp_path / "settings.toml"
    file.write_text(content)
    assert str(file) in said(None, file)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"host = '\xff'")
    (tmp_path / "folder").mkdir()
    for name in ("nowhere.toml", "folder", "latin.toml"):
        assert name in said(None, tmp_path / name)


def test_options_that_are_no_json(monkeypatch):
    done = hiddenlake("worker", "/nowhere", "--engine-options", "{", "--model", "x")
    assert done.returncode and "--engine-options" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("HIDDENLAKE_ENGINE_OPTIONS", "{")
    assert "HIDDENLAKE_ENGINE_OPTIONS" in said()
    monkeypatch.setenv("HIDDENLAKE_ENGINE_OPTIONS", "[1]")
    assert "HIDDENLAKE_ENGINE_OPTIONS" in said()


def test_a_bad_setting_ends_the_command_in_one_sentence(lake):
    for arguments, variables in (
        (("--port", "x"), {}),
        ((), {"HIDDENLAKE_PORT": "x"}),
        (("--config", "none.toml"), {}),
    ):
        done = hiddenlake("serve", lake, *arguments, **variables)
        assert done.returncode and "Traceback" not in done.stderr and done.stdout == ""
        assert arguments[0] in done.stderr if arguments else "HIDDENLAKE_PORT" in done.stderr


@lru_cache
def attributes():
    """Names that are read as attributes of something, outside of the table itself."""
    found = set()
    for room in ("cache", "probing", "src/hiddenlake"):
        for path in (REPO / room).rglob("*.py"):
            if path.name != "settings.py" and "testing" not in path.parts:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        owner = node.value
                        if "settings" in (
                            getattr(owner, "id", None),
                            getattr(owner, "attr", None),
                            getattr(owner, "attr", "")[1:],
                        ):
                            found.add(node.attr)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_read_somewhere(name):
    assert name in attributes()
