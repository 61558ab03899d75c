"""One prompt on the page: how its cache stands to its text, who used it, and how to ask it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkcached.api.responses import PromptStatus, RecentAnswer
from rkcached.api.status import prompt_status
from rkcached.api.words import shown_prompt
from rkcached.reconcile.snapshot import Snapshot
from rkcached.serving.dispatcher import Serving
from rkcached.sources.access_keys import FIRST_OWNER
from rkcached.sources.records import Key
from rkcached.worker.held import NOBODY

BARS: Final = 60

RecentOf = Callable[[Key], list[tuple[int, RecentAnswer]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    status: dict[str, Any]
    """As the status document has it."""
    changes: tuple[tuple[str, str, str], ...]
    """Of each component of the fingerprint that differs: its name, the old and the new value."""
    text: str | None
    """None where it cannot be read, and for somebody without a name: files may be for some only."""
    digest: str
    answers: tuple[RecentAnswer, ...]
    """The last ones from its cache, oldest first."""
    users: tuple[tuple[str, int], ...]
    """Who got these answers, and how many."""
    as_curl: str
    as_python: str


def prompt_view(
    name: str,
    snapshot: Snapshot,
    serving: Serving,
    recent: RecentOf,
    *,
    viewer: int | None,
    socket: Path,
    origin: str,
) -> PromptView | None:
    """None if this user knows no such prompt.

    `origin`: the URL by which the browser reached the page, for the lines to copy.
    """
    key = Key(*name.partition("/")[::2])
    assessment = snapshot.assessments.get(key)
    if assessment is None:
        return None

    text = snapshot.desired.texts.get(key) if viewer != NOBODY else None
    answers = recent(key)
    users = Counter(_user(owner, viewer) for owner, _ in answers)
    return PromptView(
        status=shown_prompt(
            PromptStatus.model_validate(prompt_status(key, snapshot, serving)).model_dump()
        ),
        changes=tuple(
            (change.component, change.old or "-", change.new or "-")
            for change in assessment.changes
        ),
        text=text,
        digest="" if text is None else hashlib.sha256(text.encode()).hexdigest(),
        answers=tuple(answer for _, answer in answers[-BARS:]),
        users=tuple(users.most_common()),
        as_curl=_as_curl(key, socket),
        as_python=_as_python(key, origin),
    )


def _user(owner: int, viewer: int | None) -> str:
    if viewer is not None:
        return "you"
    return f"uid {owner}" if owner < FIRST_OWNER else f"the key with the owner {owner}"


def _question(key: Key) -> dict[str, Any]:
    return {"model": str(key), "messages": [{"role": "user", "content": "hello"}]}


def _as_curl(key: Key, socket: Path) -> str:
    body = json.dumps(_question(key))
    return (
        f"curl -s --unix-socket {shlex.quote(str(socket))} "
        f"http://localhost/v1/chat/completions \\\n  -d {shlex.quote(body)}"
    )


def _as_python(key: Key, origin: str) -> str:
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{origin}/v1", api_key="none")\n'
        "answer = client.chat.completions.create(\n"
        f'    model="{key}", messages=[{{"role": "user", "content": "hello"}}]\n'
        ")\n"
        "print(answer.choices[0].message.content)"
    )
