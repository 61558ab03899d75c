"""Events in the daemon, for whoever listens: metrics, and clients of the event stream.

On the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

# Events that wait for a slow reader; one that falls further behind is let go.
_BACKLOG = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    kind: str
    """artifact, worker: its state changed. build: one ended. answer: a request was answered.
    summary: what the daemon says of itself in one line changed; a rejected manifest is in it."""
    fields: dict[str, Any]
    time: float = field(default_factory=time.time)
    """Unix seconds."""


Listener = Callable[[Event], None]


class Events:
    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._closed = False

    def publish(self, kind: str, **fields: Any) -> None:
        event = Event(kind=kind, fields=fields)
        for listener in tuple(self._listeners):
            listener(event)
        for queue in tuple(self._queues):
            if queue.qsize() >= _BACKLOG:
                self._queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def listen(self, listener: Listener) -> None:
        """Call it with every event; it must neither raise nor wait."""
        self._listeners.add(listener)

    async def stream(self, heartbeat_s: float) -> AsyncIterator[Event | None]:
        """Every event from now on, and None after each silence.

        Ends with the daemon, or if the reader is too slow.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        if self._closed:
            return
        self._queues.add(queue)
        try:
            while True:
                event: Event | None
                try:
                    async with asyncio.timeout(heartbeat_s):
                        event = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)
