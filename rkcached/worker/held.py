"""The text in an engine's KV state, as a session knows it, and whose text that is. Pure.

The engine reuses whatever of its state a prompt begins with, by tokens. That would tell one user,
by the time it takes, what another asked. So a state that holds more than declared text is only left
in the engine for the user who made it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from rkcached.engines.base import EngineInfo
from rkcached.engines.prefix import common_bytes
from rkcached.worker import protocol

NOBODY = -1
"""The owner of a state in which nothing is private."""


class Step(Enum):
    """How the state is brought to what a prompt can best be answered from."""

    KEEP = "keep"
    LOAD = "load"
    """The request's prompt cache is loaded."""
    CLEAR = "clear"


class Held(NamedTuple):
    """The text in the KV state, as far as that is known."""

    text: bytes = b""
    owner: int = NOBODY

    def step(self, operation: protocol.Generate, info: EngineInfo) -> Step:
        """The step to take before this run."""
        must_go = operation.cold or self.owner not in (NOBODY, operation.owner)
        has_bytes = 0
        if info.keeps_state and not must_go:
            has_bytes = common_bytes(self.text, operation.prompt.encode())
            if not info.rewinds and has_bytes < len(self.text):
                has_bytes = 0

        gained_bytes = operation.common_bytes - has_bytes
        is_usable = operation.cache is not None and (operation.is_whole or info.rewinds)
        if is_usable and gained_bytes > operation.load_bytes:
            return Step.LOAD
        return Step.CLEAR if must_go else Step.KEEP
