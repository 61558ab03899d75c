"""Sends an answer as it comes, whole or as a stream.

Before the first piece of an answer a request may wait for its turn, for its model and for its
prefill: a minute on a small board, in which clients and proxies give up a connection that says
nothing. So a stream gives signs of life. Until the first of them an error has its own status.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from rkcached.api.exchange import answer, remember
from rkcached.api.streamed import Streamed, unless_gone
from rkcached.api.writer import Writer
from rkcached.errors import RequestError
from rkcached.serving.job import End, Progress, Text

SIGN_OF_LIFE_S = 5.0

Events = AsyncGenerator[Progress | Text | End, None]
"""Of one request: its progress, the pieces of the answer, its end."""


async def send_answer(
    request: Request, events: Events, writer: Writer, *, stream: bool
) -> Response:
    """The response for these events. Errors: RequestError."""
    if not stream:
        return await unless_gone(request, _whole(events, writer))

    opening = _Opening(events, writer)
    begun: Response | bytes = b""
    try:
        begun = await unless_gone(request, opening.next_bytes())
    finally:
        if not isinstance(begun, bytes) or not begun:
            await opening.close()
    if isinstance(begun, Response):
        return begun
    return Streamed(_stream(begun, opening, request), media_type=writer.media_type)


async def _whole(events: Events, writer: Writer) -> Response:
    texts: list[Text] = []
    async for event in events:
        if isinstance(event, End):
            return answer(writer.whole(texts, event))
        if isinstance(event, Text):
            texts.append(event)
    raise RuntimeError("an answer without an end")


class _Opening:
    """The time until the first piece of a stream. Afterwards its events come as they are."""

    def __init__(self, events: Events, writer: Writer) -> None:
        self.events = events
        self.writer = writer
        self.is_over = False
        """A piece has come, or the end."""
        self._coming: asyncio.Task[Progress | Text | End] | None = None

    async def next_bytes(self) -> bytes:
        """The next write: a sign of life, or the first piece. Errors: RequestError."""
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        while True:
            event = await self._next(deadline - time.monotonic())
            if event is None:
                return self.writer.waiting()
            if not isinstance(event, Progress):
                data = _written(self.writer, event)
                self.is_over = isinstance(event, End) or bool(data)
                if self.is_over:
                    return data
            elif told := self.writer.progress(event):
                return told

    async def _next(self, patience_s: float) -> Progress | Text | End | None:
        if self._coming is None:
            self._coming = asyncio.ensure_future(anext(self.events))
        await asyncio.wait({self._coming}, timeout=max(0.0, patience_s))
        if not self._coming.done():
            return None
        coming, self._coming = self._coming, None
        return coming.result()

    async def close(self) -> None:
        """Stop the generation."""
        if self._coming is not None:
            self._coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, RequestError):
                await self._coming
        with contextlib.suppress(RequestError):
            await self.events.aclose()


def _written(writer: Writer, event: Text | End) -> bytes:
    return writer.piece(event) if isinstance(event, Text) else writer.end(event)


async def _stream(begun: bytes, opening: _Opening, request: Request) -> AsyncGenerator[bytes, None]:
    """If the client goes away, this is closed, which stops the generation."""
    try:
        yield begun
        while not opening.is_over:
            yield await opening.next_bytes()
        async for event in opening.events:  # each event is one write: it wakes the client once
            if not isinstance(event, Progress) and (data := _written(opening.writer, event)):
                yield data
    except RequestError as error:
        remember(request, error)
        yield opening.writer.error(error)
    finally:
        await opening.close()
