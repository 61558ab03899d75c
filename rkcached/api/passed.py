"""The sockets that systemd passes to a daemon that it starts for their clients.

One that the daemon would not serve is rejected, and where it does not start, those that wait are
told why.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rkcached.api.request_id import new_request_id
from rkcached.errors import ManifestError, SettingsError

SOCKET_NAMES = ("rkcached", "admin")
"""FileDescriptorName of systemd's sockets, for requests and for changes."""


def check_passed(passed: Mapping[str, Iterable[socket.socket]]) -> None:
    """Reject a socket of systemd that we would not serve: its clients would wait for ever.

    Errors: SettingsError.
    """
    for name, sockets in passed.items():
        for listener in sockets:
            if name not in SOCKET_NAMES:
                raise SettingsError(
                    f"systemd passes a socket named {name!r}, which rkcached does not know",
                    hint=f"set FileDescriptorName={SOCKET_NAMES[0]} in its .socket unit "
                    f"for requests, or {SOCKET_NAMES[1]} for changes",
                )
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise SettingsError(
                    f"the socket that systemd passes as {name!r} does not listen for connections",
                    hint="its .socket unit must have ListenStream= and Accept=no",
                )


def refuse_waiting(listener: socket.socket, error: ManifestError | SettingsError) -> None:
    """Answer every client that waits in this socket with an error.

    Otherwise systemd would start us again for it at once. Over TCP nobody has shown a key, so no
    file is named.
    """
    message = "the daemon does not start; its log says why"
    problems = None
    if listener.family == socket.AF_UNIX:
        message = error.message
        if isinstance(error, ManifestError):
            problems = list(map(asdict, error.problems))
    answer = refusal("503 Service Unavailable", message, "not_started", problems)
    with contextlib.suppress(OSError):  # nobody waits any more, or it is none that listens
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(0.2)
                connection.recv(1 << 16)
                connection.sendall(answer)


def refusal(
    status: str, why: str, code: str, problems: list[dict[str, Any]] | None = None
) -> bytes:
    """A whole answer for a client whose request nobody reads. `problems`: of the manifest."""
    kind = "server_error" if status.startswith("5") else "invalid_request_error"
    error: dict[str, Any] = {"message": why, "type": kind, "param": None, "code": code}
    if problems is not None:
        error["problems"] = problems

    body = json.dumps({"error": error}).encode()
    head = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"X-Request-Id: {new_request_id()}",  # all answers have one; our commands know us by it
        "Connection: close",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
