"""A request while it is answered: the file that it goes on from, its times, and its pieces."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from rkcached.serving.job import Job, Progress, Text
from rkcached.serving.reuse import Found
from rkcached.worker import protocol


@dataclass(slots=True, kw_only=True)
class Ongoing:
    """A request while it is answered. Times are in monotonic seconds, 0 before they are known."""

    job: Job
    found: Found = field(default_factory=Found)
    started: float = 0.0
    """When its turn came first."""
    model_load_s: float = 0.0
    load_ms: float = 0.0
    load_error: protocol.Loaded | None = None
    loading: bool = False
    """The worker is loading the prompt cache: only a death now is the cache's fault."""
    looked: bool = False
    """The model had changed, and was looked at again."""
    answering: bool = False
    """The client may have seen a piece."""
    first_written: float = 0.0
    """When the first piece had been taken, which for a stream means: sent."""
    cached_tokens: int | None = None
    """Of the request, in the KV state when its prefill began, if the engine says so."""
    pieces: asyncio.Queue[Text | Progress | None] = field(default_factory=asyncio.Queue)
    """Of the answer, as they come, and before them of its prefill; None when the work has ended."""

    def take_progress(self, event: protocol.Progress) -> None:
        if self.cached_tokens is None:
            self.cached_tokens = event.done_tokens
        progress = Progress(
            cached_tokens=self.cached_tokens,
            read_tokens=event.done_tokens,
            total_tokens=event.total_tokens,
        )
        self.pieces.put_nowait(progress)

    def with_waiting(self, text: Text) -> Text:
        """A piece and those that came while the one before was written: one write for all."""
        if self.pieces.empty():
            return text

        pieces = [text]
        while not self.pieces.empty():
            piece = self.pieces.get_nowait()
            if piece is None:
                self.pieces.put_nowait(None)
                break
            if isinstance(piece, Text):
                pieces.append(piece)

        logprobs = tuple(token for piece in pieces for token in piece.logprobs)
        return Text(text="".join(piece.text for piece in pieces), logprobs=logprobs)
