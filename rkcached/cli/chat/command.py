"""Asks one question, or begins a conversation."""

from __future__ import annotations

import os
import sys
from typing import Any

from rkcached.cli.chat.conversation import Conversation
from rkcached.errors import UsageError
from rkcached.host.settings import Settings


def run(
    settings: Settings,
    model: str | None,
    message: str | None,
    *,
    max_tokens: int | None,
    cold: bool,
    want_json: bool,
) -> int:
    """Without `message` it comes from standard input; at a terminal a conversation begins.

    Without `model` one is chosen there.
    """
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if message is None and not is_terminal:
        message = _from_standard_input()
    if message is not None and not is_text(message):
        raise UsageError("the question is not text in UTF-8", hint="send it as text")
    if message == "":
        raise UsageError("there is no question", hint="give it as an argument or on standard input")
    if model is None and (message is not None or want_json):
        raise UsageError(
            "no model is named", hint="name one: rkcached chat MODEL; `rkcached status` lists them"
        )

    options: dict[str, Any] = {}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if cold:
        options["cache"] = False

    if message is None:
        from rkcached.cli.chat import terminal

        terminal.talk(settings.socket, model, options)
        return os.EX_OK

    conversation = Conversation(settings.socket, model or "", options)
    if want_json:
        conversation.ask_for_json(message)
    elif not conversation.ask(message):
        raise KeyboardInterrupt
    return os.EX_OK


def is_text(message: str) -> bool:
    """Whether an argument was UTF-8: its other bytes are halves of surrogate pairs."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_standard_input() -> str:
    """Errors: UsageError."""
    data = b""
    if sys.stdin is not None:
        data = sys.stdin.buffer.read()
    try:
        question = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError(
            "standard input is not text in UTF-8", hint="send the question as text"
        ) from None
    if not question:
        raise UsageError("there is no question", hint="give it as an argument or on standard input")
    return question
