"""The HTTP server: uvicorn, on sockets of ours and with connections of ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from rkcached.api.connection import MAX_HEAD_BYTES, Connection

KEEP_ALIVE_S = 75
"""A connection without a request stays open for this long. Clients that keep connections close them
earlier by themselves; otherwise a request could come just when we close."""

STALLED_AT_STOP_S = 0.5
"""Stalled clients are closed this long before the end of the grace, so that the answers of others
can end."""


def _is_port(server: asyncio.Server) -> bool:
    return any(listener.family != socket.AF_UNIX for listener in server.sockets)


class OnceLooked:
    """ASGI: makes requests that concern models wait for the first look.

    A daemon that was started by such a request knows no model yet.
    """

    _AT_ONCE = frozenset({"/", "/healthz", "/readyz", "/metrics", "/v1/status", "/v1/events"})

    def __init__(self, app: ASGIApp, looked: asyncio.Event) -> None:
        self._app = app
        self._looked = looked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._AT_ONCE:
            await self._looked.wait()
        await self._app(scope, receive, send)


class HttpServer(uvicorn.Server):
    """uvicorn on a socket of ours, without its signal handlers and its ten wake-ups a second."""

    def __init__(self, app: ASGIApp, *, grace_s: int) -> None:
        config = uvicorn.Config(
            app,
            access_log=False,
            date_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            http=Connection,
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=grace_s,
            timeout_keep_alive=KEEP_ALIVE_S,
            ws="none",
        )
        super().__init__(config)
        self.servers = []  # until it has started, uvicorn has no such attribute
        self._grace_s = grace_s
        self._leave = asyncio.Event()
        self.answering = asyncio.Event()

    async def listen(self, listener: socket.socket) -> None:
        """Listen on this Unix socket instead of the one before. Ports stay as they are."""

        def connection() -> asyncio.Protocol:
            return Connection(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        kept = [server for server in self.servers if _is_port(server)]
        for server in self.servers:
            if server not in kept:
                server.close()
        server = await asyncio.get_running_loop().create_server(
            connection, sock=listener, backlog=128
        )
        self.servers = [*kept, server]

    def stop_accepting(self) -> None:
        """Leave new connections in the socket, for the next daemon where systemd holds it."""
        for server in self.servers:
            server.close()

    def stop(self) -> None:
        """Refuse connections, let answers end within the grace, then return from `serve`."""
        self.should_exit = True
        self._leave.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        after_s = max(0.0, self._grace_s - STALLED_AT_STOP_S)
        timer = asyncio.get_running_loop().call_later(after_s, self._close_stalled)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _close_stalled(self) -> None:
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, Connection) and connection.flow.write_paused:
                connection.transport.abort()

    async def main_loop(self) -> None:
        self.answering.set()
        await self.on_tick(0)
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
