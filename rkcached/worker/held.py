"""The text in each KV state of an engine, as a session knows it, and whose text that is. Pure.

The engine reuses whatever of its state a prompt begins with, by tokens. That would tell one user,
by the time it takes, what another asked. So a state that holds more than declared text is only left
in the engine for the user who made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import msgspec

from rkcached.engines.base import EngineInfo
from rkcached.engines.prefix import common_bytes
from rkcached.worker import protocol

NOBODY = -1
"""The owner of a state in which nothing is private."""

UNKNOWN = -2
"""The owner of a state that a client left whose user the kernel does not tell, as over TCP. It is
open to nobody, not even to the next such client."""

EVERYBODY = -3
"""The owner of what all users share, where the manifest has `serving.share_state`."""

_WORTH_KEEPING_BYTES = 64
"""A conversation that has less beyond the file that it began with, some 16 tokens, is read again as
quickly."""

_WORTH_GUESSING_BYTES = 512
"""Nobody knows whether a first question is followed by another one, or sent again with the same
tools. With so much text, some 128 tokens, it is worth a file."""

_ENDING_BYTES = 64
"""The last bytes of a rendered request, where the answer begins, may be others in the next one."""


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
    asked_bytes: int = 0
    """The length of the request that it ends with; the answer comes after it."""
    cached_bytes: int = 0
    """So much of it is in a file: of a prompt cache, or of a saved conversation."""
    goes_on: bool = False
    """See `protocol.Generate`."""

    def step(self, operation: protocol.Generate, info: EngineInfo) -> Step:
        """The step to take before this run."""
        if _loaded_bytes(operation, info) > self.reused_bytes(operation, info):
            return Step.LOAD
        must_go = operation.cold or not self._is_open_to(operation)
        return Step.CLEAR if must_go else Step.KEEP

    def reused_bytes(self, operation: protocol.Generate, info: EngineInfo) -> int:
        """So much of the run's prompt can be taken from this state."""
        if operation.cold or not info.keeps_state or not self._is_open_to(operation):
            return 0
        has_bytes = self._common_bytes(operation)
        return has_bytes if info.rewinds or has_bytes == len(self.text) else 0

    def is_continued_by(self, operation: protocol.Generate) -> bool:
        """Whether this run goes on with the conversation."""
        shared = self._common_bytes(operation)
        return self._is_open_to(operation) and shared >= self.asked_bytes - _ENDING_BYTES

    @property
    def is_worth_keeping(self) -> bool:
        """Whether it is a conversation that would have to be read again."""
        least = _WORTH_KEEPING_BYTES if self.goes_on else _WORTH_GUESSING_BYTES
        return self.owner not in (NOBODY, UNKNOWN) and len(self.text) - self.cached_bytes >= least

    def _is_open_to(self, operation: protocol.Generate) -> bool:
        return self.owner in (NOBODY, owner_of(operation)) and self.owner != UNKNOWN

    def _common_bytes(self, operation: protocol.Generate) -> int:
        return common_bytes(self.text, operation.prompt.encode())


def state_for(helds: Mapping[int, Held], operation: protocol.Generate, info: EngineInfo) -> int:
    """The KV state that a run had best go on from, or replace.

    `helds`: what each state holds, the least recently used first. Where no state has as much of the
    prompt as the file to load, a conversation that may go on is left alone. A cold run replaces
    what it would have gone on from.
    """
    if operation.cold:
        operation = msgspec.structs.replace(operation, cold=False)
    best = max(helds, key=lambda state: helds[state].reused_bytes(operation, info))
    held = helds[best]
    loaded_bytes = _loaded_bytes(operation, info)
    least_bytes = loaded_bytes if loaded_bytes > 0 else _WORTH_KEEPING_BYTES
    if held.is_worth_keeping and not held.is_continued_by(operation):
        least_bytes += _WORTH_GUESSING_BYTES
    return best if held.reused_bytes(operation, info) >= least_bytes else free(helds)


def free(helds: Mapping[int, Held]) -> int:
    """An empty KV state, or else the first."""
    return next((state for state, held in helds.items() if not held.text), next(iter(helds)))


def _loaded_bytes(operation: protocol.Generate, info: EngineInfo) -> float:
    """So much of the prompt comes from the file of the run, less what loading it costs."""
    is_usable = operation.cache is not None and (operation.is_whole or info.rewinds)
    return operation.common_bytes - operation.load_bytes if is_usable else 0


def owner_of(operation: protocol.Generate) -> int:
    """Whose the state is that this run leaves."""
    return UNKNOWN if operation.owner == NOBODY else operation.owner
