"""Logs: one line of JSON an event, on stderr, without any text of a prompt, an answer or a key."""

import logging
import sys
import traceback
from types import TracebackType
from typing import Any

from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("hiddenlake.service")

_FIELDS = "%(asctime)s %(levelname)s %(message)s"


class _Formatter(JsonFormatter):
    """Of an exception, where it came from and its class: its message may quote what a client sent."""

    def formatException(  # noqa: N802 - logging's name
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        kind, _, trace = ei
        return f"{'; '.join(f'{f.filename}:{f.lineno} {f.name}' for f in traceback.extract_tb(trace))}: {kind and kind.__name__}"


def start_logging(level: str) -> None:
    """Of this process, from now on: ours, and what uvicorn says beside its access log."""
    handler = logging.StreamHandler(sys.stderr)
    names = {"asctime": "time", "levelname": "level", "message": "event"}
    handler.setFormatter(_Formatter(_FIELDS, rename_fields=names))
    for name in ("hiddenlake.service", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level.upper())
    # What others warn of, asyncio above all, would else be printed with messages of exceptions.
    logging.getLogger().handlers = [handler]


def event(name: str, level: int = logging.INFO, **facts: Any) -> None:
    """name : what happened.  facts : ids and numbers."""
    logger.log(level, name, extra=facts)
