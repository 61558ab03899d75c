"""Knows the events that an operation may have: of a broken worker no answer is believed."""

from __future__ import annotations

from rkcached.worker import protocol

_ANSWERS: dict[type, type] = {
    protocol.Build: protocol.Built,
    protocol.Generate: protocol.Done,
    protocol.Check: protocol.Checked,
    protocol.Keep: protocol.Checked,
    protocol.Embed: protocol.Embedded,
    protocol.Rank: protocol.Ranked,
    protocol.Tokenize: protocol.Tokenized,
}

_MOST_LETTERS = 256
"""Of a token."""


class Expected:
    """The events that a worker of ours may send in an operation."""

    def __init__(self, operation: protocol.Operation) -> None:
        self._operation = operation
        self._letters = 0  # of the answer, until now
        most_tokens = 64
        if isinstance(operation, protocol.Generate):
            most_tokens += operation.sampling.max_new_tokens
        self._most_letters = most_tokens * _MOST_LETTERS

    def not_by(self, event: protocol.FromWorker) -> str:
        """Why the event is none of these; empty if it is one."""
        operation = self._operation
        kind = type(event).__name__
        if isinstance(event, protocol.Ready) or event.id != operation.id:
            return f"sent {kind} out of turn"
        if isinstance(event, protocol.Result) and not isinstance(event, _ANSWERS[type(operation)]):
            return f"answered {type(operation).__name__} with {kind}"
        if isinstance(event, protocol.Piece):
            self._letters += len(event.text)
        if self._letters > self._most_letters:
            return f"sent an answer of {self._letters:,} letters"
        return ""
