"""`GET /`: the daemon's status as one HTML page, for a browser that reaches the socket.

All of it is made here, from the document of `GET /v1/status`. The page's script listens to the
event stream, asks for the page again and takes over the changes. So there is one template, which
escapes every value, and nothing else to load.
"""

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
from rkcached.api.exchange import Streamed
from rkcached.api.responses import Status
from rkcached.api.status import PIECE

# Only the page's own script and style run, and only the daemon is asked, whatever text is in the
# page.
_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
    "connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# So many pieces of the template make one of the answer: the row of a prompt that has a cache is 21.
_BUFFERED = 21 * PIECE


def page(status: Status) -> Streamed:
    headers = {
        "Content-Security-Policy": _policy(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Streamed(_pieces(status), media_type="text/html", headers=headers)


async def _pieces(status: Status) -> AsyncGenerator[bytes]:
    """Row by row, as there may be thousands of prompts: the event loop turns between the pieces."""
    known = words.shown(status.model_dump(exclude={"prompts"}) | {"prompts": []})
    prompts = (words.shown_prompt(prompt.model_dump()) for prompt in status.prompts)

    stream = _template().stream(**_shown(known), prompts=prompts)
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
        "summary": words.summary_of,
        "when": lambda at: time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at)),
        "utc": lambda at: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "note": words.note_of,
        "no_prompts": words.no_prompts,
        "medians": words.medians_of,
        "hits": words.hits_of,
        "worker": words.worker_of,
    }
    return environment.from_string(_source())


@functools.cache
def _source() -> str:
    return resources.files("rkcached.api").joinpath("page.html.jinja").read_text(encoding="utf-8")


@functools.cache
def _policy() -> str:
    def digest(tag: str) -> str:
        text = _source().partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return _POLICY.format(script=digest("script"), style=digest("style"))


def _shown(status: dict[str, Any]) -> dict[str, Any]:
    waiting = sum(model["waiting"] for model in status["models"])
    times = [answer["ttft_ms"] for answer in status["recent"]]
    top = max(times, default=0.0) or 1.0
    return {
        "status": status,
        "waiting": waiting,
        "running": status["running"] - waiting,
        "bars": [max(1.0, time / top * 40) for time in times],
        "fastest": min(times, default=0.0),
        "slowest": max(times, default=0.0),
    }
