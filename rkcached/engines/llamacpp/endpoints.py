"""llama.cpp's own HTTP endpoints, on a Unix socket in the worker's private scratch folder.

A TCP port would be open to every local user.
"""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any

from rkcached.errors import EngineError
from rkcached.host.unix_http import UnixConnection

_SOCKET_NAME = "llama.sock"
_SOCKET_PATH_MAX = 107  # sun_path holds 108 bytes, the last one is 0


class RefusedError(EngineError):
    """llama.cpp answered with an HTTP error."""

    status = 0


class Endpoints:
    """A client of these endpoints, for one request at a time."""

    def __init__(self, scratch: Path) -> None:
        """Errors: EngineError, where the folder's path is too long for a socket in it."""
        self.socket = str(scratch / _SOCKET_NAME)
        self.closed = False

        if len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            raise EngineError(
                f"the socket path {self.socket} is longer than {_SOCKET_PATH_MAX} bytes",
                hint="use a shorter runtime directory",
            )

    def ask(self, method: str, target: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of the answer. Errors: RefusedError; EngineError where there is none."""
        if self.closed:
            raise EngineError("the engine is closed")

        content = None if body is None else json.dumps(body)
        connection = UnixConnection(self.socket)
        try:
            connection.request(method, target, content)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineError(f"llama.cpp does not answer {method} {target}: {error}") from error
        finally:
            connection.close()

        if response.status != http.HTTPStatus.OK:
            refused = RefusedError(str(answer.get("error", {}).get("message", answer)))
            refused.status = response.status
            raise refused
        return answer
