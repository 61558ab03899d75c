"""The listening socket and the HTTP server on it.

A stale socket is replaced; one that a live daemon answers on, and a file that is no socket, are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkcached.errors import SocketError
from rkcached.exchange import PEER

MAX_PATH_BYTES = 107
"""sockaddr_un has room for 108 bytes, the last of which is zero (unix(7))."""

SOCKET_MODE = 0o660
ADMIN_MODE = 0o600


def open_socket(path: Path, mode: int = SOCKET_MODE) -> socket.socket:
    """Listen on a Unix socket at `path`. Errors: SocketError with the next step."""
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise SocketError(
            f"the socket path has {length} bytes, the system allows {MAX_PATH_BYTES}: {path}",
            hint="name a shorter one with --socket or RKCACHED_SOCKET",
        )
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _clear_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(128)
    except OSError as error:
        raise SocketError(
            f"cannot listen on {path}: {error.strerror}", hint="choose another path with --socket or RKCACHED_SOCKET"
        ) from error
    listener.setblocking(False)
    return listener


def remove_socket(path: Path, inode: int) -> None:
    """Take our socket away, but not one that somebody else has put there."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def refuse_waiting(listener: socket.socket, why: str) -> None:
    """Tell every client that waits in this socket why it is not answered: else it would start us again at once."""
    body = json.dumps(
        {"error": {"message": why, "type": "server_error", "param": None, "code": "not_started"}}
    ).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(0.2)
                connection.recv(1 << 16)
                connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)


def _clear_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"{path} exists and is not a socket", hint="remove that file, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # nobody listens: left behind by a daemon that was killed
            return
        except FileNotFoundError:
            return
        except TimeoutError:
            pass
    raise SocketError(
        f"another daemon listens on {path}", hint="stop it, or choose another path with --socket or RKCACHED_SOCKET"
    )


class _Connection(H11Protocol):
    """Knows who is at the other end, as the kernel saw it when the connection was made (unix(7), SO_PEERCRED)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            self.app_state = {**self.app_state, PEER: {"uid": uid, "pid": pid}}


class OnceLooked:
    """ASGI: lets requests that concern models wait for the first look.

    A daemon that was started by this very request knows of no model yet.
    """

    _AT_ONCE = frozenset({"/healthz", "/readyz", "/metrics", "/v1/status", "/v1/events"})

    def __init__(self, app: ASGIApp, looked: asyncio.Event) -> None:
        self._app = app
        self._looked = looked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._looked.is_set() and scope["type"] == "http" and scope["path"] not in self._AT_ONCE:
            await self._looked.wait()
        await self._app(scope, receive, send)


class HttpServer(uvicorn.Server):
    """uvicorn on a socket of ours, without its signal handlers and without its ten wake-ups a second."""

    def __init__(self, app: ASGIApp, *, grace_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                date_header=False,
                http=_Connection,
                lifespan="off",
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=grace_s,
                ws="none",
            )
        )
        self.servers = []  # until it has started, uvicorn has no such attribute
        self._leave = asyncio.Event()
        self.answering = asyncio.Event()

    def stop_accepting(self) -> None:
        """Connections that come from now on wait in the socket: for the next daemon, where systemd holds it."""
        for server in self.servers:
            server.close()

    def stop(self) -> None:
        """Refuse new connections, let running answers end within the grace, then return from `serve`."""
        self.should_exit = True
        self._leave.set()

    async def main_loop(self) -> None:
        self.answering.set()
        await self.on_tick(0)
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
