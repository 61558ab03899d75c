"""The thread in which chat templates of other people are rendered, one after the other.

A slow template blocks no other thread, and each template has one place in the queue: however many
requests wait for a slow one, those of another wait for one work of it only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from rkcached.messages.template import ChatTemplate

Result = TypeVar("Result")


class RenderThread:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        # By the template's digest, for as long as somebody has a turn or waits for it.
        self._turns = WeakValueDictionary[str, asyncio.Lock]()

    async def do(self, template: ChatTemplate, work: Callable[[], Result]) -> Result:
        """Do what renders this template. Errors: TemplateError."""
        if not template.may_wait:
            return work()

        turn = self._turns.setdefault(template.digest, asyncio.Lock())
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
