"""Renders the page from the status document and the view that the address asks for."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import time
from collections.abc import AsyncGenerator
from importlib import resources
from typing import Any

import jinja2

from rkcached.api import words
from rkcached.api.page.prompt import PromptView
from rkcached.api.page.view import Rows, View
from rkcached.api.responses import RecentAnswer, Status
from rkcached.api.status import PIECE
from rkcached.api.streamed import Streamed
from rkcached.errors import harmless, printable
from rkcached.plan import vocabulary

# Only the page's own script and style run, and only the daemon is asked, whatever text is in the
# page.
_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
    "connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

# So many pieces of the template make one of the answer: the row of a prompt that has a cache is 27.
_BUFFERED = 27 * PIECE


def page(status: Status, view: View, rows: Rows, about: PromptView | None) -> Streamed:
    """`status` has the prompts of `rows`; `about`: the one that the view names, if it exists."""
    headers = {
        "Content-Security-Policy": _policy(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    pieces = _pieces(status, {"view": view, "rows": rows, "about": about})
    return Streamed(pieces, media_type="text/html", headers=headers)


async def _pieces(status: Status, given: dict[str, Any]) -> AsyncGenerator[bytes]:
    """Row by row, as there may be thousands of prompts: the event loop turns between the pieces."""
    known = words.shown(status.model_dump(exclude={"prompts"}) | {"prompts": []})
    prompts = (words.shown_prompt(prompt.model_dump()) for prompt in status.prompts)

    stream = _template().stream(**_shown(known), prompts=prompts, **given)
    stream.enable_buffering(_BUFFERED)
    for piece in stream:
        yield piece.encode()
        await asyncio.sleep(0)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "size": words.size,
        "number": words.number,
        "duration": words.duration,
        "summary": words.summary_of,
        "when": lambda at: time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at)),
        "utc": lambda at: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "ms": words.milliseconds,
        "note": words.note_of,
        "no_prompts": words.no_prompts,
        "medians": lambda status: words.medians_of(status).replace(" ms", "\N{NO-BREAK SPACE}ms"),
        "hits": words.hits_of,
        "worker": words.worker_of,
        "errors": words.errors_of,
        "warnings": words.warnings_of,
        "retired": words.retired_of,
        "answers": words.answers_of,
        "done": words.done_of,
        "state": words.state_of,
        "tone": vocabulary.tone_of,
        "meaning": lambda state: vocabulary.STATES[state].meaning,
        "bars": bars,
        "printable": printable,
        "harmless": harmless,
    }
    return environment.from_string(_source())


@functools.cache
def _source() -> str:
    return resources.files("rkcached.api.page").joinpath("page.html.jinja").read_text("utf-8")


@functools.cache
def _policy() -> str:
    def digest(tag: str) -> str:
        text = _source().partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return _POLICY.format(script=digest("script"), style=digest("style"))


def _shown(status: dict[str, Any]) -> dict[str, Any]:
    waiting = sum(model["waiting"] for model in status["models"])
    return {"status": status, "waiting": waiting, "running": status["running"] - waiting}


def bars(answers: list[dict[str, Any]] | tuple[RecentAnswer, ...]) -> list[dict[str, Any]]:
    """A bar for each answer: its state, and its height, of 40, by its time to first token."""
    given = [one if isinstance(one, dict) else one.model_dump() for one in answers]
    top = max((one["ttft_ms"] for one in given), default=0.0) or 1.0
    return [
        {
            "state": one["state"],
            "height": max(1.0, one["ttft_ms"] / top * 40),
            "ttft_ms": one["ttft_ms"],
        }
        for one in given
    ]
