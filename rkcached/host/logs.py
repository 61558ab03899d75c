"""Log lines: one event with fields a line, on standard error.

`artifact built model=... prompt=... prefill_ms=...`.

Where standard error is systemd's journal, the event goes there as an entry with the same fields.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from rkcached.host.journal import Journal
from rkcached.host.systemd import is_journal

_ERROR_OUTPUT = 2
"""The number of standard error's file."""

_OPTIONS = ("exc_info", "stack_info", "stacklevel")
"""Arguments of the standard library's loggers, beside the fields of an event."""


class EventLogger(logging.LoggerAdapter[logging.Logger]):
    """Logs events with fields: `log.info("artifact built", model="qwen", prompt="assistant")`."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        return msg, {**options, "extra": {"fields": kwargs}}


log = EventLogger(logging.getLogger("rkcached"))
"""The logger of all rooms."""


def configure(level: str) -> None:
    """Send our events and the libraries' log records to standard error or the journal."""
    _keep_standard_files()
    journal = _journal()
    handler: logging.Handler = _Output(_ERROR_OUTPUT)
    handler.setFormatter(_Line())
    if journal is not None:
        handler = _Entries(journal, otherwise=handler)

    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level.upper())

    # `watch` itself logs that events were lost.
    logging.getLogger("watchdog").setLevel(logging.ERROR)


def _keep_standard_files() -> None:
    """Open what was closed of standard input, output and error, but for nothing.

    Else the next file or socket would have its number, and log lines would go there.
    """
    for fd in range(_ERROR_OUTPUT + 1):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


def _journal() -> Journal | None:
    """The journal, if standard error leads there and it takes entries."""
    if not is_journal(_ERROR_OUTPUT):
        return None
    try:
        return Journal()
    except OSError:
        return None


class _Output(logging.Handler):
    """Writes lines to a file that may be a full disk, or a pipe whose reader has stopped or gone.

    It waits for neither: the lines that nobody takes are counted, and the next one that is taken
    says how many were lost.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self._lost:
            lines = "1 line before this was" if self._lost == 1 else f"{self._lost} lines were"
            text = f"{time.strftime('%H:%M:%S')} warning {lines} lost: nobody took them\n{text}"

        data = f"{text}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[self._write(data[: select.PIPE_BUF]) :]
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def _write(self, part: bytes) -> int:
        """Errors: OSError, also where writing would wait."""
        if not self._poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, "it takes nothing now")
        return os.write(self._fd, part)


class _Line(logging.Formatter):
    """An event or a library's record as a line, with the traceback of its exception below it."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S")
        return f"{stamp} {record.levelname.lower():<7} {self.message(record)}"

    def message(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if fields is None:
            return f"{record.name}: {super().format(record)}"

        trace = record.__dict__["fields"].get("exception", "")
        if record.exc_info:
            trace = self.formatException(record.exc_info)

        shown = " ".join(f"{key}={_value(value)}" for key, value in fields.items())
        line = f"{record.getMessage()} {shown}".rstrip()
        return f"{line}\n{trace}" if trace else line


class _Entries(logging.Handler):
    """Sends each record to the journal, or, while it does not take any, to another handler."""

    def __init__(self, journal: Journal, *, otherwise: logging.Handler) -> None:
        super().__init__()
        self._journal = journal
        self._otherwise = otherwise
        self._line = _Line()

    def emit(self, record: logging.LogRecord) -> None:
        fields = _fields(record)
        try:
            self._journal.send(
                level=record.levelname.lower(),
                message=self._line.message(record),
                event=record.getMessage() if fields is not None else "",
                fields={"logger": record.name} if fields is None else fields,
            )
        except OSError:
            self._otherwise.emit(record)


def _fields(record: logging.LogRecord) -> dict[str, Any] | None:
    """The fields of one of our events that hold anything; None for a library's record.

    A traceback that an event brings along stands below its line.
    """
    fields: Mapping[str, Any] | None = getattr(record, "fields", None)
    if fields is None:
        return None

    return {
        key: value
        for key, value in fields.items()
        if value not in ("", None) and key != "exception"
    }


def _value(value: object) -> str:
    """The value on one line, quoted if it has blanks: the next field is not a part of it."""
    text = str(value)
    if any(c.isspace() or c in "\"'=" for c in text) or not text.isprintable():
        return repr(text)
    return text
