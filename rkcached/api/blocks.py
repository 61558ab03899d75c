"""Divides an answer into blocks, as interfaces want it that are not OpenAI's older one. Pure.

A block is a run of text, a run of reasoning, or one tool call. A writer turns each step into the
events of its stream, or takes the blocks of a whole answer.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from rkcached.messages.call_readers import ToolCall
from rkcached.messages.reply import Delta, Reply


class BlockKind(Enum):
    TEXT = auto()
    REASONING = auto()
    CALL = auto()


@dataclass(slots=True, kw_only=True)
class Block:
    index: int
    kind: BlockKind
    id: str
    call: ToolCall | None = None
    """Of a block that is one."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text; of a call, its arguments."""
        return "".join(self.pieces)


class Step(Enum):
    BEGIN = auto()
    PIECE = auto()
    END = auto()


Steps = Iterator[tuple[Step, Block, str]]
"""A step, its block, and the text of a piece."""


class Blocks:
    """Feed it the pieces of an answer, then end it; the steps come in the order of the answer."""

    def __init__(self, reply: Reply, ids: dict[BlockKind, str], *, one_call: bool) -> None:
        """`ids`: what the ids of blocks begin with. `one_call`: drop all calls but the first."""
        self.done: list[Block] = []
        self.has_calls = False
        self._reply = reply
        self._ids = ids
        self._one_call = one_call
        self._open: Block | None = None

    def feed(self, text: str) -> Steps:
        return self._take(self._reply.feed(text))

    def end(self) -> Steps:
        yield from self._take(self._reply.end())
        yield from self._close()

    def _take(self, deltas: Iterable[Delta]) -> Steps:
        for delta in deltas:
            if delta.call is not None:
                yield from self._take_call(delta.call)
            elif delta.reasoning:
                yield from self._take_text(BlockKind.REASONING, delta.reasoning)
            else:
                yield from self._take_text(BlockKind.TEXT, delta.content)

    def _take_call(self, call: ToolCall) -> Steps:
        if self._one_call and self.has_calls:
            return

        self.has_calls = True
        yield from self._begin(BlockKind.CALL, call)
        yield from self._append(call.arguments)
        yield from self._close()

    def _take_text(self, kind: BlockKind, text: str) -> Steps:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        yield from self._append(text)

    def _begin(self, kind: BlockKind, call: ToolCall | None = None) -> Steps:
        yield from self._close()
        block_id = f"{self._ids[kind]}{uuid.uuid4().hex}"
        self._open = Block(index=len(self.done), kind=kind, id=block_id, call=call)
        yield Step.BEGIN, self._open, ""

    def _append(self, text: str) -> Steps:
        if self._open is not None:
            self._open.pieces.append(text)
            yield Step.PIECE, self._open, text

    def _close(self) -> Steps:
        if self._open is not None:
            self.done.append(self._open)
            yield Step.END, self._open, ""
            self._open = None
