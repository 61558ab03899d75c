"""The thread in which requests are rendered that would hold up the event loop, one after the other.

These are large ones, and those of chat templates of other people, which are rendered in another
process. Each template, and each user with large requests, has one place in the queue: however many
requests wait for a slow one, those of others wait for one work of it only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from rkcached.messages.template import ChatTemplate

Result = TypeVar("Result")

LARGE_BYTES = 16 << 10
"""A body that is larger is rendered here. A smaller one takes some milliseconds at the most."""


class RenderThread:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        # For as long as somebody has a turn or waits for it.
        self._turns = WeakValueDictionary[str, asyncio.Lock]()

    async def do(
        self, template: ChatTemplate, work: Callable[[], Result], *, caller: int, size_bytes: int
    ) -> Result:
        """Do what renders a request of this size by this template. Errors: those of `work`."""
        if template.may_wait:
            place = template.digest
        elif size_bytes > LARGE_BYTES:
            place = f"user {caller}"
        else:
            return work()

        turn = self._turns.setdefault(place, asyncio.Lock())
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
