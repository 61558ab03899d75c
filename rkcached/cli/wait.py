"""`rkcached wait`: return when prompt caches are fresh, or say why they never will be.

A thread hears the daemon's events and wakes the loop here, which asks for the status when the
daemon is there and after each event that can matter. A daemon that is not there yet, or that goes,
is waited for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from rkcached.api import words
from rkcached.cli import exit_codes, output
from rkcached.cli.client import Client, follow
from rkcached.cli.status import show
from rkcached.errors import (
    AnotherServer,
    DaemonUnreachable,
    ManifestError,
    NotAllowed,
    NotFresh,
    Problem,
    RequestError,
    RkcachedError,
    SourceError,
    StillWaiting,
    printable,
)
from rkcached.host.settings import Settings
from rkcached.sources.names import hint_for

if TYPE_CHECKING:
    from rkcached.cli import forms

# Events after which a prompt may be in another state; the first means that the daemon is there.
_MATTERS = ("listening", "artifact", "build", "summary")

# States that stay until somebody changes something, unless there is a time for the next attempt.
_LASTING = ("blocked", "quarantined", "uncacheable", "uncached")

_MOST_NAMES = 3

_MORE_TIME = "give it more time with --timeout; `rkcached status` shows the progress"

_FILES_ARE_GONE = "mount the folder or put its files back; or take it out of prompts_from"

_Inbox = queue.SimpleQueue[str | RkcachedError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """The result of waiting. Without errors all are fresh."""

    waited_s: float
    prompts: list[dict[str, Any]]
    """Those that were asked for, as the status has them; empty where no daemon answered."""
    errors: tuple[RkcachedError, ...] = ()

    @property
    def exit_code(self) -> int:
        if self.errors:
            return self.errors[0].exit_code
        return os.EX_OK

    def data(self) -> forms.Waited:
        """As `--json` prints it."""
        outcome: Literal["fresh", "never", "timeout"] = "fresh"
        if self.errors:
            outcome = "never"
            if isinstance(self.errors[0], StillWaiting):
                outcome = "timeout"

        return {
            "format": 1,
            "outcome": outcome,
            "waited_s": round(self.waited_s, 3),
            "errors": output.complaints_data(self.errors),
            "prompts": self.prompts,
        }


def run(settings: Settings, names: Sequence[str], *, timeout_s: float, want_json: bool) -> int:
    with output.progress_line() as report:
        result = wait(settings.socket, names, timeout_s=timeout_s, report=report)

    if want_json:
        output.print_json(result.data())
        return result.exit_code

    if not result.errors:
        click.echo(f"{len(result.prompts)} fresh, after {result.waited_s:.1f} s")
    for error in result.errors:
        exit_codes.complain(error)
    return result.exit_code


def wait(
    socket: Path, names: Sequence[str], *, timeout_s: float, report: Callable[[str], None]
) -> Waited:
    """Wait until the prompts that MODEL or MODEL/PROMPT name are fresh.

    Without names, all that are declared.

    `report` is called with what is waited for, when that changed. Errors: SourceError for a name
    that is not declared, ManifestError while the daemon's manifest is rejected, NotAllowed,
    AnotherServer, RequestError.
    """
    started = time.monotonic()
    inbox: _Inbox = queue.SimpleQueue()
    waits_for_all = ("*",)
    listening = (socket, inbox, names or waits_for_all)
    threading.Thread(target=_listen, args=listening, daemon=True).start()
    looked = False
    waits_for = f"nothing has answered on {socket} yet"
    hint = _MORE_TIME
    prompts: list[dict[str, Any]] = []

    while (left_s := started + timeout_s - time.monotonic()) > 0:
        report(waits_for)
        heard = _last_heard(inbox, left_s)
        if heard is None:
            break
        if isinstance(heard, NotAllowed | AnotherServer | RequestError | ManifestError):
            raise heard

        if isinstance(heard, RkcachedError):
            waits_for = heard.message
            hint = heard.hint
            continue

        try:
            # The files may have changed a moment ago: the daemon looks at them first.
            status = _status(
                socket, look=not looked, patience_s=started + timeout_s - time.monotonic()
            )
        except DaemonUnreachable as error:
            waits_for = error.message
            continue

        looked = status["ready"]
        hint = _MORE_TIME
        if not looked:
            waits_for = f"the daemon is {status['summary']}"
            continue

        _check_manifest(status)
        prompts = _chosen(names, status)
        waited_s = time.monotonic() - started
        if lasting := [*_troubles(names, status), *filter(None, map(_never, prompts))]:
            return Waited(waited_s=waited_s, prompts=prompts, errors=tuple(lasting))

        waiting = [prompt for prompt in prompts if prompt["state"] != "fresh"]
        if not waiting:
            return Waited(waited_s=waited_s, prompts=prompts)

        waits_for = f"{len(prompts) - len(waiting)} of {len(prompts)} fresh; {_sentence(waiting)}"

    late = StillWaiting(f"time is up after {timeout_s:g} s: {waits_for}", hint=hint)
    return Waited(waited_s=time.monotonic() - started, prompts=prompts, errors=(late,))


def _listen(socket: Path, inbox: _Inbox, names: Sequence[str]) -> None:
    for heard in follow(socket, names):
        if isinstance(heard, RkcachedError) or heard in _MATTERS:
            inbox.put(heard)


def _last_heard(inbox: _Inbox, patience_s: float) -> str | RkcachedError | None:
    """The newest of the events that came; None if none comes in time."""
    heard = None
    with contextlib.suppress(queue.Empty):
        heard = inbox.get(timeout=patience_s)
        while True:
            heard = inbox.get_nowait()
    return heard


def _status(socket: Path, *, look: bool, patience_s: float) -> dict[str, Any]:
    with Client(socket, patience_s=max(patience_s, 0.001)) as client:
        return client.status(look=look)


def _check_manifest(status: dict[str, Any]) -> None:
    """Errors: ManifestError, as nobody knows then what is declared."""
    problems = []
    for problem in status["manifest"]["problems"]:
        place, _, message = problem.partition(": ")
        problems.append(Problem(file=place, line=0, message=message))
    if problems:
        raise ManifestError(tuple(problems))


def _chosen(names: Sequence[str], status: dict[str, Any]) -> list[dict[str, Any]]:
    """The declared prompts that are named, in the manifest's order. Errors: SourceError."""
    declared = [prompt for prompt in status["prompts"] if show.is_declared(prompt)]
    known = [model["name"] for model in status["models"]]
    known += map(words.name_of, declared)
    troubled = {model["name"] for model in status["models"] if model["trouble"]}

    for name in names:
        if name not in known and name.partition("/")[0] not in troubled:
            hint = (
                f"{hint_for(name, known)}; with `rkcached reload` the daemon reads the manifest now"
            )
            raise SourceError(f"{name!r} is not declared", hint=hint)

    if not names:
        return declared
    return [p for p in declared if p["model"] in names or words.name_of(p) in names]


def _troubles(names: Sequence[str], status: dict[str, Any]) -> Iterator[NotFresh]:
    """Troubles of named models that no prompt explains: not all prompts may be known.

    Nor are they where the files of a prompts_from folder are gone.
    """
    declared = [prompt for prompt in status["prompts"] if show.is_declared(prompt)]
    for model in status["models"]:
        own = [prompt for prompt in declared if prompt["model"] == model["name"]]
        explained = any(prompt["state"] in _LASTING for prompt in own)
        named = {name for name in names if name.partition("/")[0] == model["name"]}
        unknown = named - set(map(words.name_of, own))
        if names and not unknown:
            continue

        if model["trouble"] and not explained:
            yield NotFresh(f"model {model['name']}: {model['trouble']}")
        for notice in model["notices"]:
            yield NotFresh(f"model {model['name']}: {notice}", hint=_FILES_ARE_GONE)


def _never(prompt: dict[str, Any]) -> NotFresh | None:
    """The reason why it will not become fresh by waiting; None if it may."""
    if prompt["state"] not in _LASTING or prompt["retry_at"] is not None:
        return None
    return NotFresh(
        f"{words.name_of(prompt)} is {prompt['state']}: {prompt['reason']}", hint=prompt["hint"]
    )


def _sentence(waiting: Sequence[dict[str, Any]]) -> str:
    """Name the first few prompts and their states, and count the others."""
    parts = [
        f"{words.name_of(prompt)} is {prompt['state']}{_more(prompt)}"
        for prompt in waiting[:_MOST_NAMES]
    ]
    if more := len(waiting) - len(parts):
        parts.append(f"{more} more")
    return printable(", ".join(parts))


def _more(prompt: dict[str, Any]) -> str:
    progress = prompt.get("progress")
    if progress and progress["total_tokens"]:
        return f" ({progress['done_tokens']} of {progress['total_tokens']} tokens)"
    if prompt["state"] == "blocked":
        return f" and will be tried again ({prompt['reason']})"
    return ""
