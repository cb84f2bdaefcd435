"""Settings: one table behind the flags of `serve`, `worker` and `up`, HIDDENLAKE_* variables, and a TOML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

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


class Settings(BaseSettings):
    """Every setting, its default and what it is for. `hiddenlake settings` prints them with their sources."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True, env_ignore_empty=True
    )

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
        _size("1GiB"), _BOTH, "Room that stays free on the lake's disk; less gives 507.", ge=0
    )
    drain: float = _setting(30.0, _BOTH, "Seconds that work in progress has to end after SIGTERM.", gt=0)
    log_level: str = _setting("info", _BOTH, "debug, info, warning or error.", pattern="^(debug|info|warning|error)$")
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
    flags = {name: value for name, value in (flags or {}).items() if value is not None}
    found: dict[str, dict[str, Any]] = {"flag": flags}
    if file is not None and not Path(file).is_file():
        raise BadInputError(f"--config {str(file)!r}: there is no such file: name a TOML file with settings")

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: Any, env_settings: Any, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = {"variable": env_settings}
            if file is not None:
                sources["file"] = TomlConfigSettingsSource(settings_cls, Path(file))
            found.update({name: source() for name, source in sources.items()})
            return init_settings, *sources.values()

    try:
        settings = Loaded(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        source = next((source for source, values in found.items() if name in values), "file")
        what = {"flag": f"--{name.replace('_', '-')}", "variable": f"{PREFIX}{name.upper()}"}.get(
            source, f"{file}: {name}"
        )
        raise BadInputError(f"{what}: {first['msg']}; `hiddenlake settings` lists all settings") from error
    except ValueError as error:  # a file that is no TOML, a variable that is no JSON
        raise BadInputError(f"the settings cannot be read: {error}") from error
    sources = {
        name: next((source for source in SOURCES if name in found.get(source, ())), "default")
        for name in Settings.model_fields
    }
    return settings, sources
