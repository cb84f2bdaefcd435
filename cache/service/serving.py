"""Serving: the app behind uvicorn, from its start to its end."""

import math
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.service.app import Parts, is_loopback, make_app
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.holdings import Holdings
from hiddenlake.cache.service.jobs import Jobs
from hiddenlake.cache.service.keeping import Keeper
from hiddenlake.cache.service.keys import Keys
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.logs import event, start_logging
from hiddenlake.cache.service.lookup import Lookup
from hiddenlake.cache.service.metrics import Metrics
from hiddenlake.cache.service.resolving import Resolver
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.service.tracing import Tracer
from hiddenlake.cache.service.work import Work


def make_parts(lake: str | Path, settings: Settings) -> Parts:
    """Raises StoreError where there is no such lake, or its database cannot be used."""
    if not Path(lake).is_dir():
        raise StoreError(f"{lake} is no folder: name the folder that holds your captures")
    seen = Lake(lake)
    database = Database(lake)
    work = Work(database)
    holdings = Holdings(database, seen)
    resolver = Resolver(settings, seen, work, Lookup(database, seen), holdings)
    return Parts(settings, seen, database, Keys(database), Metrics(work), work, Jobs(database), holdings, resolver)


def serve(
    lake: str | Path,
    settings: Settings,
    *,
    routers: Sequence[Any] = (),
    ready: Callable[[str, str | None], None] | None = None,
) -> None:
    """Serve a lake until SIGTERM or SIGINT. Work in progress has `drain` seconds to end.

    ready : called with the URL, and the key that was made for this run because there is none, once it listens.

    Raises BadInputError where it would listen beyond this machine and there is no key, or what it needs is not installed;
    StoreError.
    """
    import uvicorn

    from hiddenlake.cache.service.connection import Connection

    parts = make_parts(lake, settings)
    temporary = None
    if not parts.keys.any():
        if not is_loopback(settings.host):
            raise BadInputError(
                f"host {settings.host} is open to other machines, and this lake has no key: make one first, with "
                f"`hiddenlake keys add {lake} NAME`"
            )
        temporary = parts.keys.add_temporary()
    tracer = None if settings.traces is None else Tracer(settings.traces, "serve")
    listening = _listen(settings.host, settings.port)
    start_logging(settings.log_level)
    config = uvicorn.Config(
        make_app(parts, routers, tracer),
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.drain),
        http=Connection,
        ws="none",
        lifespan="on",
    )
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    keeper = Keeper(parts)
    # uvicorn ends its work, and then sends itself the signal again: what runs beside it is ended after that.
    signal.signal(signal.SIGTERM, _leave)
    try:
        if ready is not None:
            ready(url, temporary)
        event("listening", url=url)
        keeper.start()
        server.run(sockets=[listening])
    finally:
        keeper.stop()
        parts.resolver.close()
        if tracer is not None:
            tracer.close()
        with suppress(OSError):
            listening.close()


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    """Raises BadInputError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_loopback(host) and hasattr(socket, "TCP_CONGESTION"):
            # A machine does not congest itself. Where BBR is the default, its timers would take longer than the sending; every
            # Linux has Reno.
            with suppress(OSError):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise BadInputError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}: choose another with --port"
        ) from error
    return listening
