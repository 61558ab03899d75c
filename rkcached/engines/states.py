"""The kinds of state that models keep while they read, as their files state them. Pure.

A state is what a prompt cache saves. Its kind decides about reuse: what is saved of every token can
be cut at any of them; a window of the last tokens and a recurrence can only be continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class StateKind(StrEnum):
    UNKNOWN = "unknown"
    """The model's files do not state it, or the engine does not read them."""
    ATTENTION = "attention"
    """Keys and values of every token."""
    WINDOW = "sliding window"
    """Some layers need the keys and values of the last tokens only."""
    RECURRENT = "recurrent"
    """Some layers, or all, keep a state of one size, however much was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFacts:
    """The kind of a model's state."""

    kind: StateKind = StateKind.UNKNOWN
    window_tokens: int = 0
    """The tokens that a layer with a sliding window attends to; 0 if no layer has one."""

    def explanation(self) -> str:
        """What the kind means for prompt caches, in a sentence; empty if it is not known."""
        whole = "it cannot be taken back, so a prompt cache is reused as a whole or not at all"
        match self.kind:
            case StateKind.UNKNOWN:
                return ""
            case StateKind.ATTENTION:
                return (
                    "keys and values of every token; any beginning that a request shares is reused"
                )
            case StateKind.WINDOW:
                return f"some layers see the last {self.window_tokens:,} tokens only; {whole}"
            case StateKind.RECURRENT:
                return f"wholly or partly recurrent; {whole}"
