"""Launches vLLM's OpenAI server with taps in its model and our routes beside its own."""

import os
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from hiddenlake.cache.engines.vllm_setup import TAP_ARGUMENTS, choose_environment, import_vllm
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.positions import parse_positions
from hiddenlake.cache.store.files import make_folders
from hiddenlake.cache.vllm_server.intake import Offer
from hiddenlake.cache.vllm_server.taps import make_taps

PLUGIN = "hiddenlake"

# Entry points that vLLM loads all of, unless VLLM_PLUGINS names some.
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def launch(
    lake: Path,
    model: str,
    *,
    sites: Sequence[str],
    layers: str,
    positions: str,
    max_request_bytes: int,
    ring_bytes: int,
    buffer_bytes: int,
    shard_samples: int,
    arguments: Sequence[str],
) -> None:
    """Serve until interrupted. Does not return while the server runs.

    lake : the folder of the captures; made if absent.
    arguments : vLLM's own, as its server takes them on its command line.
    The rest is as in `Offer` and `make_taps`.

    Raises HiddenlakeError before the server is ready, if it cannot capture.
    """
    parse_positions(positions)
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    import_vllm()
    choose_environment()
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    args = _parse(["--model", model, *arguments])
    make_folders(lake)
    taps = make_taps(
        model,
        sites=sites,
        layers=layers,
        dtype=None if args.dtype == "auto" else args.dtype,
        ring_bytes=ring_bytes,
        spill=lake,
    )
    args.dtype = taps.model.dtype
    vars(args).update(taps.arguments(args.additional_config))
    args.hiddenlake = Offer(
        lake=lake,
        model=taps.model,
        sites=taps.plan.sites,
        layers=taps.plan.layers,
        positions=tuple(positions.split(",")),
        row_bytes=taps.row_bytes,
        max_request_bytes=max_request_bytes,
        buffer_bytes=buffer_bytes,
        shard_samples=shard_samples,
    )
    uvloop.run(run_server(args))


def _parse(arguments: Sequence[str]) -> Namespace:
    """vLLM's own parser and checks, and ours. Raises BadInputError."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    for name, ours in TAP_ARGUMENTS.items():
        if getattr(args, name):
            raise BadInputError(f"vLLM's --{name.replace('_', '-')} is set to {ours} by hiddenlake: leave it out")
    if (args.api_server_count or 1) != 1:
        raise BadInputError(
            f"vLLM's --api-server-count {args.api_server_count} was not tested with capture: leave it at 1"
        )
    return args


def _plugins() -> list[str]:
    """Ours, and those that vLLM would load without a list of names: all but routes, which must be named."""
    if named := os.environ.get("VLLM_PLUGINS"):
        return list(dict.fromkeys([*named.split(","), PLUGIN]))
    routes = {plugin.name for plugin in entry_points(group="vllm.endpoint_plugins")}
    others = {plugin.name for group in _GROUPS for plugin in entry_points(group=group)} - routes
    return [*sorted(others), PLUGIN]
