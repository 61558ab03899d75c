"""Answers whose work ends when the client goes away: whole ones, and streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rkcached.api.exchange import shown_path
from rkcached.host.logs import log

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | Response:
    """Wait for `work`, and cancel it if the client goes away: nobody reads the answer then."""
    try:
        async with _while_listened_to(request.receive):
            return await work
    except _GoneError:
        log.info("client went away", path=shown_path(request.url.path))
        return Response(status_code=499)


class Streamed(Response):
    """A body in chunks.

    If the client goes away, the generator of the chunks is closed, which ends the work behind it.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """`at_end`: is called when the answer is over, also if it never began."""
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(scope, receive, send)
        finally:
            if self._at_end is not None:
                self._at_end()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        with contextlib.suppress(_GoneError):
            async with _while_listened_to(receive), contextlib.aclosing(self._chunks):
                if scope["method"] != "HEAD":
                    async for chunk in self._chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


class _GoneError(Exception):
    """The client went away."""


@contextlib.asynccontextmanager
async def _while_listened_to(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body when the client goes away; it then ends with _GoneError.

    The body runs in its caller's task: a task of its own would wake up one turn of the loop later,
    each time.
    """
    task = asyncio.current_task()
    left = False
    is_over = False

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def leave(watcher: asyncio.Task[None]) -> None:
        nonlocal left
        # Removing a callback that the loop is about to call comes too late: the body has ended, and
        # what its caller does next must not be cancelled.
        if task is not None and not is_over and not watcher.cancelled():
            left = True
            task.cancel()

    watcher = asyncio.create_task(disconnected())
    watcher.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if task is None or not left or task.uncancel() > 0:
            raise
        raise _GoneError from None
    finally:
        is_over = True
        watcher.remove_done_callback(leave)
        watcher.cancel()
