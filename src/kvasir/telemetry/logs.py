"""Logs of every process: one line per event, for people at a terminal or as JSON. Prompts never appear in them."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from kvasir.core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")

_PRIVATE = frozenset({"prompt", "messages", "text", "content", "tokens", "completion", "authorization", "api_key"})
"""Fields that may hold what a user wrote, or a key: dropped wherever they come from."""


def setup(level: str, json: bool, *, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's log to `stream` (stderr), from `level` up. May be called again."""
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} does not exist; choose one of {', '.join(LEVELS)}")
    out = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True)
        if json
        else structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
        drop_private,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_last(json, out)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # these tell of every start, request and connection; our own lines say more
    for noisy in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def drop_private(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Remove the fields that might hold a prompt or a key."""
    for name in _PRIVATE & event.keys():
        del event[name]
    return event


def _last(json: bool, out: TextIO) -> list[Processor]:
    # a traceback with local variables would show prompts, so both renderers format it plainly
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if json:
        return [strip, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [strip, structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)]
