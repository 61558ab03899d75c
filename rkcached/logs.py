"""Log lines: one event with fields a line, on standard error. `artifact built model=... prompt=... prefill_ms=...`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]


def configure(level: str) -> None:
    """Route this program's events and the libraries' log records to standard error, in one form."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it logs errors about its own shutdown
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _without_empty,
            _line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _without_empty(_logger: object, _method: str, event: Event) -> Event:
    return {key: value for key, value in event.items() if value not in ("", None)}


def _line(_logger: object, _method: str, event: Event) -> str:
    stamp = time.strftime("%H:%M:%S")
    level, name = event.pop("level"), event.pop("event")
    trace = event.pop("exception", "")
    fields = " ".join(f"{key}={_value(value)}" for key, value in event.items())
    return f"{stamp} {level:<7} {name} {fields}".rstrip() + (f"\n{trace}" if trace else "")


def _value(value: object) -> str:
    """A value that can be told from the next field: quoted if it has blanks, always on one line."""
    text = str(value)
    return repr(text) if any(c.isspace() or c in "\"'=" for c in text) or not text.isprintable() else text
