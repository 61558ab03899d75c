"""Finds the text of a request that could be declared as a prompt, or the reason why none. Pure.

A prompt is a text for the system message, so only a beginning that ends inside or after the system
message can be had of one. Whether the chat template then writes the same beginning is tried.
"""

from __future__ import annotations

from typing import NamedTuple

from rkcached.engines.prefix import common_bytes
from rkcached.errors import SourceError, TemplateError
from rkcached.serving.job import SYSTEM_MESSAGE, Job
from rkcached.serving.repeats import BLOCK
from rkcached.sources.text_files import MAX_PROMPT_BYTES

TOOLS_HINT = (
    "declare its text and its tools with a prompt in the manifest (tools: FILE); "
    "`rkcached prompts import` makes both files of recorded requests"
)


class SystemPart(NamedTuple):
    """The system message of a rendered request; places in bytes, all 0 if there is none."""

    text: str = ""
    begin: int = 0
    end: int = 0


def system_part(job: Job, rendered: bytes) -> SystemPart:
    """Where the system message is, if the chat template writes it as it was sent."""
    if not job.parts or job.parts[0].name != SYSTEM_MESSAGE:
        return SystemPart()

    sent = job.parts[0].text.rstrip("\r\n")
    for text in (sent, sent.strip()):
        data = text.encode(errors="ignore")
        begin = rendered.find(data) if data else -1
        if begin >= 0:
            return SystemPart(text, begin, begin + len(data))
    return SystemPart()


def text_to_declare(job: Job, rendered: bytes, size_bytes: int) -> str:
    """The text that a prompt needs to have this beginning of the request, or the most of it.

    Errors: SourceError with the reason why there is none.
    """
    system = system_part(job, rendered)
    if not system.text:
        raise SourceError(
            "the requests have no system message that the chat template writes as it is",
            hint="send what repeats as the system message: only that can become a prompt",
        )
    if size_bytes >= system.end + BLOCK and job.with_tools:
        raise SourceError(
            "the beginning goes on after the system message, with the tools of the requests",
            hint=TOOLS_HINT,
        )

    text = system.text
    if size_bytes < system.end:
        inside = rendered[system.begin : max(system.begin, size_bytes)]
        text = inside[: inside.rfind(b"\n") + 1].decode().rstrip("\r\n")
    if not text.strip():
        raise SourceError(
            "the requests have no whole line of the system message in common",
            hint="put what changes from request to request on lines behind all that stays",
        )

    if len(text.encode()) > MAX_PROMPT_BYTES:
        raise SourceError(
            f"the system message has more than {MAX_PROMPT_BYTES:,} bytes", hint="shorten it"
        )
    if text.startswith("\ufeff"):
        raise SourceError("the system message begins with a byte order mark", hint="remove it")
    return text


def check_that_it_begins(job: Job, rendered: bytes, text: str) -> None:
    """Check that a prompt with this text would begin the request. It renders, so it may be slow.

    Errors: SourceError.
    """
    try:
        prefix = job.model.template.prefix(text).encode()
    except TemplateError as error:
        raise SourceError(error.message, hint=error.hint) from error

    needed_bytes = rendered.find(text.encode()) + len(text.encode())
    if common_bytes(prefix, rendered) >= needed_bytes:
        return

    hint = "ask without naming a prompt, or declare the text in the manifest"
    if job.with_tools:
        hint = TOOLS_HINT
    elif job.variables:
        names = ", ".join(job.variables)
        hint = f"declare the prompt in the manifest with {names} as chat_template_kwargs"
    raise SourceError(
        "before the text, the chat template writes something else for a stored prompt than for "
        "these requests",
        hint=hint,
    )
