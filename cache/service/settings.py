"""Settings: one table behind the flags of `serve`, `worker` and `up`, HIDDENLAKE_* variables, and a TOML file."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from hiddenlake.cache.errors import BadInputError

PREFIX = "HIDDENLAKE_"

# Where a value can come from, the strongest first.
SOURCES = ("flag", "variable", "file", "default")

_SERVE, _WORKER, _BOTH = ("serve",), ("worker",), ("serve", "worker")


def _setting(default: Any, commands: tuple[str, ...], help: str, **limits: Any) -> Any:
    # An endless time cannot be waited for.
    finite = {"allow_inf_nan": False} if isinstance(default, float) else {}
    return Field(default, description=help, json_schema_extra={"commands": list(commands)}, **finite, **limits)


def _size(text: str) -> ByteSize:
    return ByteSize._validate(text, None)


class Settings(BaseModel):
    """Every setting, its default and what it is for. `hiddenlake settings` prints them with their sources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = _setting(
        "127.0.0.1", _SERVE, "Address to listen at. Beyond this machine only with a key that was added."
    )
    port: int = _setting(8765, _SERVE, "Port to listen at; 0 for a free one.", ge=0, le=65535)
    max_body: ByteSize = _setting(_size("8MiB"), _SERVE, "Largest body of a request.", gt=0)
    max_read: ByteSize = _setting(
        _size("4GiB"), _SERVE, "Largest answer to a read; larger ones are asked for in parts.", gt=0
    )
    max_inputs: int = _setting(1000, _SERVE, "Most prompts of one request.", gt=0)
    max_tokens: int = _setting(1_000_000, _SERVE, "Most tokens of one request, prompts and answers together.", gt=0)
    max_rows: int = _setting(1000, _SERVE, "Most samples that one page of a listing shows.", gt=0)
    max_wait: float = _setting(60.0, _SERVE, "Seconds that a request may wait for what it asks for.", gt=0)
    max_concurrent: int = _setting(128, _SERVE, "Requests of one key that are answered at once; more get 429.", gt=0)
    max_queue: ByteSize = _setting(
        _size("64GiB"), _SERVE, "Activations that may wait to be computed, by what they will take; more get 429.", gt=0
    )
    quota: ByteSize | None = _setting(
        None,
        _SERVE,
        "Bytes that computed captures may take; beyond it the least recently used go. No limit by default.",
    )
    min_free: ByteSize = _setting(
        _size("1GiB"), _SERVE, "Room that stays free on the lake's disk; less gives 507.", ge=0
    )
    drain: float = _setting(30.0, _BOTH, "Seconds that work in progress has to end after SIGTERM.", gt=0)
    log_level: str = _setting("info", _BOTH, "debug, info, warning or error.", pattern="^(debug|info|warning|error)$")
    traces: str | None = _setting(
        None,
        _BOTH,
        "Where OpenTelemetry traces go: an address of OTLP over HTTP, such as http://localhost:4318. Needs the extra `otel`.",
        pattern="^https?://",
    )
    patience: float = _setting(
        600.0, _SERVE, "Seconds that work waits for a worker of its model before it fails.", gt=0
    )
    lease: float = _setting(
        30.0, _BOTH, "Seconds without a sign of life after which a worker's prompts are another's.", gt=0
    )
    attempts: int = _setting(3, _BOTH, "Workers that may die over one prompt before it is given up.", gt=0)
    sites: str = _setting("mlp_out", _WORKER, "Sites that are tapped, by comma.")
    layers: str = _setting("all", _WORKER, "Layers that are tapped: `all`, or 13 or 0,5,10-12.")
    max_new_tokens: int = _setting(512, _WORKER, "Longest answer that may be asked for, in tokens.", gt=0)
    max_prompt: int = _setting(4096, _WORKER, "Longest prompt, in tokens.", gt=0)
    ring_bytes: ByteSize = _setting(_size("2GiB"), _WORKER, "Memory for rows that wait for their positions.", gt=0)
    buffer_bytes: ByteSize = _setting(
        _size("512MiB"), _WORKER, "Memory for the two shards being filled and written.", gt=0
    )
    shard_samples: int = _setting(64, _WORKER, "Most samples of a shard of what is computed.", gt=0)
    publish: float = _setting(
        2.0, _WORKER, "Seconds in which finished prompts are collected before they are published.", gt=0
    )
    engine: str = _setting(
        "vllm", _WORKER, "`vllm`, or `transformers`, the slower reference.", pattern="^(vllm|transformers)$"
    )
    dtype: str | None = _setting(None, _WORKER, "`bfloat16`, `float16` or `float32`; default the checkpoint's own.")
    engine_options: dict[str, Any] = _setting({}, _WORKER, "The engine's own settings, as JSON.")


def of_command(command: str) -> dict[str, Any]:
    """name -> pydantic's field, of the settings that a command reads."""
    return {
        name: field
        for name, field in Settings.model_fields.items()
        if command == "up" or command in field.json_schema_extra["commands"]
    }


def load_settings(
    flags: Mapping[str, Any] | None = None, file: str | Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """The settings, and where each of them comes from (one of SOURCES).

    flags : what was given on the command line.  file : a TOML file with the settings' names at its top level.

    Raises BadInputError, naming the setting and its source.
    """
    variables = {name: os.environ.get(f"{PREFIX}{name.upper()}") for name in Settings.model_fields}
    given = {
        "flag": {name: value for name, value in (flags or {}).items() if value is not None},
        "variable": {name: value for name, value in variables.items() if value},
        "file": {} if file is None else _read(file),
    }
    sources = {name: next((s for s in given if name in given[s]), "default") for name in Settings.model_fields}
    # A name that is no setting can only be in the file.
    chosen = {name: given[sources.get(name, "file")][name] for values in given.values() for name in values}

    def bad(name: str, what: str) -> BadInputError:
        where = {"flag": f"--{name.replace('_', '-')}", "variable": f"{PREFIX}{name.upper()}"}
        place = where.get(sources.get(name, "file"), f"{file}: {name}")
        return BadInputError(f"{place}: {what}; `hiddenlake settings` lists all settings")

    for name, value in chosen.items():
        if isinstance(value, bool):  # pydantic would take it for a number
            raise bad(name, "a number or a text is expected")
        if name == "engine_options" and isinstance(value, str):
            try:
                chosen[name] = json.loads(value)
            except ValueError as error:
                raise bad(name, f"not JSON ({error})") from error
    try:
        return Settings(**chosen), sources
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise bad(str(first["loc"][0]), first["msg"]) from error


def _read(file: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise BadInputError(f"--config {str(file)!r}: {error.strerror}: name a TOML file with settings") from error
    except ValueError as error:
        raise BadInputError(f"{file}: not TOML ({error}): settings are lines like `port = 8765`") from error
