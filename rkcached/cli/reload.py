"""`rkcached reload`: one request to the admin socket, without an HTTP library, as `systemctl reload` waits for it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import click

from rkcached.errors import DaemonUnreachable, ManifestError, NotAllowed, Problem, RkcachedError
from rkcached.host import places

_TIMEOUT_S = 60.0
"""A look that hashes a large model for the first time takes this long; usually it is a tenth of a
second."""


def run(admin_socket: Path | None) -> int:
    click.echo(reload(admin_socket or places.admin_socket_to_ask()))
    return os.EX_OK


def reload(admin_socket: Path) -> str:
    """Have the daemon read its manifest.

    Returns its summary. Errors: ManifestError, DaemonUnreachable, NotAllowed.
    """
    status, body = _post(admin_socket, "/v1/reload")
    if status == 200:
        return str(json.loads(body)["summary"])
    said = json.loads(body)["error"]
    if said.get("problems"):
        raise ManifestError(tuple(Problem(**problem) for problem in said["problems"]))
    raise RkcachedError(said["message"])


def _post(path: Path, route: str) -> tuple[int, bytes]:
    """Status and body of an answer that the server ends by closing, as HTTP/1.0 has it."""
    request = f"POST {route} HTTP/1.0\r\nHost: rkcached\r\nContent-Length: 0\r\n\r\n".encode()
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(str(path))
            connection.sendall(request)
            while data := connection.recv(1 << 16):
                answer += data
        except PermissionError as error:
            raise NotAllowed(str(path)) from error
        except OSError as error:
            raise DaemonUnreachable(
                f"no daemon answers on {path}: {error}", hint="is it running?"
            ) from error
    head, separator, body = bytes(answer).partition(b"\r\n\r\n")
    if not separator:
        raise DaemonUnreachable("the daemon broke off", hint="its log says why")
    return int(head.split(maxsplit=2)[1]), body
