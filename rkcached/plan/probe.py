"""The probe of a prompt cache: a request that is answered with it and without, to compare. Pure."""

from __future__ import annotations

from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import ToolSet

PROBE_QUESTION = "Answer in one sentence: what are you for?"
"""Asked twice after every build: on the state in memory, and on the state from the file."""


def texts_of(template: ChatTemplate, text: str, tools: ToolSet | None) -> tuple[str, str]:
    """The prefix of a prompt and a whole request that starts with it. Errors: TemplateError."""
    shown = tools.plain() if tools is not None else []
    probe = [Message(role="system", content=text), Message(role="user", content=PROBE_QUESTION)]
    return template.prefix(text, shown), template.render(probe, shown)
