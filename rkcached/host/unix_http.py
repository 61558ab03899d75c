"""HTTP over a Unix socket, by Python's own library: it costs 10 ms to import, others cost 60."""

from __future__ import annotations

import http.client
import os
import select
import socket
from pathlib import Path
from typing import Self


class UnixConnection(http.client.HTTPConnection):
    """A connection that can be kept between requests.

    Errors: OSError, http.client.HTTPException.
    """

    def __init__(
        self, path: str | Path, *, connect_s: float | None = None, silence_s: float | None = None
    ) -> None:
        """`connect_s` and `silence_s`: how long connecting and each read may take; None waits."""
        super().__init__("localhost")
        self._path = os.fspath(path)
        self._connect_s = connect_s
        self._silence_s = silence_s

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._connect_s)
            connection.connect(self._path)
            connection.settimeout(self._silence_s)
        except OSError:
            connection.close()
            raise

        self.sock = connection

    def ready(self) -> Self:
        """Connect, also where the other side closed the connection because it was idle."""
        if self.sock is not None and select.select([self.sock], [], [], 0)[0]:
            self.close()
        if self.sock is None:
            self.connect()
        return self
