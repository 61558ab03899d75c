"""Writes log events to the systemd journal, as entries with fields: `journalctl MODEL=...`.

The protocol is documented at https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. An entry is bounded in
size, so that a datagram always carries it. This module only knows events, which are names with
fields, and not the program's log pipeline.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

SOCKET = "/run/systemd/journal/socket"

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""The priorities of syslog(3), by the names of levels."""

_MAX_VALUE_LETTERS = 16 << 10
# Words that are too common to search for in everybody's journal.
_RENAMED = {"STATE": "ARTIFACT_STATE"}

_OWN = frozenset({"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "EVENT"})
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


class Journal:
    """An open connection to journald. Errors of the constructor: OSError."""

    def __init__(self, path: str = SOCKET) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(path)
            self._socket.setblocking(False)  # a journal that has stopped must not stop us
        except OSError:
            self._socket.close()
            raise

    def send(
        self, *, level: str, message: str, event: str = "", fields: Mapping[str, Any] | None = None
    ) -> None:
        """Write one entry. Errors: OSError."""
        self._socket.sendall(entry(level=level, message=message, event=event, fields=fields or {}))


def entry(*, level: str, message: str, event: str, fields: Mapping[str, Any]) -> bytes:
    """The datagram of one entry."""
    own = {
        "MESSAGE": message,
        "PRIORITY": str(PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": "rkcached",
    }
    if event:
        own["EVENT"] = event

    names = {_RENAMED.get(name.upper(), name.upper()): str(value) for name, value in fields.items()}
    given = {
        name: value for name, value in names.items() if name not in _OWN and _FIELD.fullmatch(name)
    }

    return b"".join(_field(name, value) for name, value in {**own, **given}.items())


def _field(name: str, value: str) -> bytes:
    data = value[:_MAX_VALUE_LETTERS].encode(errors="backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
