"""Commands of the service: serve, keys, settings."""

import inspect
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import Json, print_table, talk

app = typer.Typer()
keys_app = typer.Typer(help="Who may ask a lake's service.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

Lake = Annotated[str, typer.Argument(help="A folder of captures.", show_default=False)]
Model = Annotated[str, typer.Option(help="Hugging Face folder, or hub id.", show_default=False)]
Config = Annotated[Path | None, typer.Option(help="A TOML file with settings.")]


def with_settings(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each setting that it reads. The function gets `flags`, those that were given."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "flags"]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
            )
            for name, option in _options(command).items()
        ]

        def run(**arguments: Any) -> None:
            flags = {p.name: arguments.pop(p.name) for p in added}
            function(**arguments, flags=flags)

        run.__signature__ = inspect.Signature([*own, *added])
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        return run

    return decorate


def _options(command: str) -> dict[str, Any]:
    try:
        from hiddenlake.cache.service.settings import of_command
    except ImportError:  # said when the command is run
        return {}
    return {
        name: typer.Option(help=f"{field.description} Default: {_shown(field.default)}.", show_default=False)
        for name, field in of_command(command).items()
    }


def _shown(value: Any) -> str:
    from pydantic import ByteSize

    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    return "none" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)


def _load(flags: dict[str, Any], config: Path | None) -> Any:
    from hiddenlake.cache.service.settings import load_settings

    return load_settings(flags, config)


def _import_service() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BadInputError(f"the service cannot be imported ({error}): pip install 'hiddenlake[serve]'") from error


@app.command("serve")
@with_settings("serve")
def serve_command(lake: Lake, config: Config = None, *, flags: dict[str, Any]) -> None:
    """Answer over HTTP what other tools ask of a lake: activations by (layer, token), samples, grids, a page.

    Without a key in the lake it makes one for this run, prints it, and answers this machine alone.
    """
    _import_service()
    from hiddenlake.cache.service.serving import serve
    from hiddenlake.probing.service.routers import make_routers

    settings, _ = _load(flags, config)
    serve(lake, settings, routers=make_routers(lake), ready=lambda url, key: _say(lake, url, key))


def _say(lake: str, url: str, key: str | None) -> None:
    talk(f"serving {lake} at {url}")
    if key is not None:
        talk(f"key, for this run alone: {key}")
        talk("(a browser asks for a name, which may be anything, and a password, which is the key)")


@app.command("worker")
@with_settings("worker")
def worker_command(
    lake: Lake,
    model: Model,
    config: Config = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Compute what is asked of a lake's service, until SIGTERM: then what is in flight is finished, the rest given back."""
    _import_service()
    from hiddenlake.cache.service.logs import start_logging
    from hiddenlake.cache.service.upping import end_with_parent
    from hiddenlake.cache.service.worker import work_on

    settings, _ = _load(flags, config)
    start_logging(settings.log_level)
    if with_parent:
        end_with_parent()
    work_on(lake, model, settings, ready=lambda offer: talk(f"worker of {offer.name} is ready for {lake}"))


@app.command("up")
@with_settings("up")
def up_command(lake: Lake, model: Model, config: Config = None, *, flags: dict[str, Any]) -> None:
    """Serve a lake and compute what is asked of it: a server, and a worker that is started again when it dies."""
    _import_service()
    from hiddenlake.cache.service.serving import serve
    from hiddenlake.cache.service.settings import of_command
    from hiddenlake.cache.service.upping import WorkerProcess
    from hiddenlake.probing.service.routers import make_routers

    settings, _ = _load(flags, config)
    own = [f"--{name.replace('_', '-')}={flags[name]}" for name in of_command("worker") if flags.get(name) is not None]
    file = ["--config", str(config)] if config is not None else []
    worker = WorkerProcess([lake, "--model", model, *file, *own], settings.drain)

    def ready(url: str, key: str | None) -> None:
        _say(lake, url, key)
        worker.start()

    try:
        serve(lake, settings, routers=make_routers(lake), ready=ready)
    finally:
        worker.stop()


@app.command("settings")
def settings_command(config: Config = None, as_json: Json = False) -> None:
    """List every setting of serve, worker and up: its value, where that comes from, and what it is for."""
    _import_service()
    from hiddenlake.cache.service.settings import PREFIX, Settings

    settings, sources = _load({}, config)
    rows = []
    for name, field in Settings.model_fields.items():
        rows.append(
            {
                "flag": f"--{name.replace('_', '-')}",
                "variable": f"{PREFIX}{name.upper()}",
                "of": field.json_schema_extra["commands"],
                "value": _shown(getattr(settings, name)),
                "from": sources[name],
                "help": field.description,
            }
        )
    print(json.dumps(rows)) if as_json else print_table(rows)


def _keys(lake: str) -> Any:
    from hiddenlake.cache.service.database import Database
    from hiddenlake.cache.service.keys import Keys

    if not Path(lake).is_dir():
        raise BadInputError(f"{lake} is no folder: name the folder that holds your captures")
    return Keys(Database(lake))


@keys_app.command("add")
def keys_add(
    lake: Lake,
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    scope: Annotated[
        str, typer.Option(help="`read`; `compute`, which includes it; or `admin`, which includes both.")
    ] = "read",
    tenant: Annotated[
        str | None, typer.Option(help="Whose captures are to be kept apart from everybody else's.")
    ] = None,
) -> None:
    """Make a key and print it. It is not kept, only its digest: it cannot be shown again."""
    print(_keys(lake).add(name, scope, tenant))


@keys_app.command("ls")
def keys_ls(lake: Lake, as_json: Json = False) -> None:
    """List keys: their ids and scopes, never themselves."""
    rows = _keys(lake).list()
    if as_json:
        print(json.dumps(rows))
        return
    print_table([row | {name: _time(row[name]) for name in ("created", "revoked")} for row in rows])


@keys_app.command("revoke")
def keys_revoke(lake: Lake, id: Annotated[str, typer.Argument(help="Of `keys ls`.", show_default=False)]) -> None:
    """Have a key mean nothing, at once."""
    _keys(lake).revoke(id)
    print(f"revoked {id}", file=sys.stderr)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
