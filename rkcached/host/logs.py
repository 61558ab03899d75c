"""Log lines: one event with fields a line, on standard error.

`artifact built model=... prompt=... prefill_ms=...`.

Where standard error is systemd's journal, the event goes there as an entry with the same fields.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

from rkcached.host.journal import Journal, JournalHandler
from rkcached.host.systemd import is_journal

Event = MutableMapping[str, Any]


def configure(level: str) -> None:
    """Send our events and the libraries' log records to standard error or the journal."""
    journal = _journal()
    if journal is not None:
        logging.basicConfig(level=logging.WARNING, handlers=[JournalHandler(journal)])
    else:
        logging.basicConfig(
            level=logging.WARNING, stream=sys.stderr, format="%(levelname)-7s %(name)s: %(message)s"
        )

    # `watch` itself logs that events were lost.
    logging.getLogger("watchdog").setLevel(logging.ERROR)

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _without_empty,
            _line if journal is None else _Entries(journal),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _without_empty(_logger: object, _method: str, event: Event) -> Event:
    return {key: value for key, value in event.items() if value not in ("", None)}


def _journal() -> Journal | None:
    """The journal, if standard error leads there and it takes entries."""
    if not is_journal(sys.stderr.fileno()):
        return None
    try:
        return Journal()
    except OSError:
        return None


class _Entries:
    """Sends each event to the journal, or, while it does not take any, to standard error."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __call__(self, _logger: object, _method: str, event: Event) -> str:
        level = event.pop("level")
        name = event.pop("event")
        message = _message(name, event)
        try:
            self._journal.send(level=level, message=message, event=name, fields=event)
        except OSError:
            return message

        raise structlog.DropEvent


def _line(_logger: object, _method: str, event: Event) -> str:
    stamp = time.strftime("%H:%M:%S")
    level = event.pop("level")
    name = event.pop("event")
    return f"{stamp} {level:<7} {_message(name, event)}"


def _message(name: str, event: Event) -> str:
    trace = event.pop("exception", "")
    fields = " ".join(f"{key}={_value(value)}" for key, value in event.items())
    line = f"{name} {fields}".rstrip()
    if trace:
        line += f"\n{trace}"
    return line


def _value(value: object) -> str:
    """The value on one line, quoted if it has blanks: the next field is not a part of it."""
    text = str(value)
    if any(c.isspace() or c in "\"'=" for c in text) or not text.isprintable():
        return repr(text)
    return text
