"""`rkcached status --watch`: the daemon's state as it changes.

One thread hears the event stream, another the keyboard, a third the end of whoever reads the
output; all only notify the loop, which asks for the status when something happened, at most four
times a second. What has no event (tokens of a build, how long something takes) is asked for once a
second while there is any. A daemon that goes is waited for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live

from rkcached.api import words
from rkcached.cli import output
from rkcached.cli.client import Client, follow
from rkcached.cli.status import show
from rkcached.cli.status.browsing import Browsing
from rkcached.cli.status.picture import GONE, brief_reason, picture
from rkcached.errors import RkcachedError

if TYPE_CHECKING:
    from rkcached.cli import forms

# Between two looks: nobody reads faster, and a busy daemon has better things to do.
_PACE_S = 0.25

_TICK_S = 1.0
_ANSWER_S = 5.0


# So long after an escape nothing else comes: it is a key of its own.
_ESCAPE_S = 0.1

# Free space and a worker's memory have no events either, and change slowly.
_IDLE_S = 10.0


class _Heard(Enum):
    CHANGE = auto()
    GONE = auto()
    CLOSED = auto()
    """Whoever read our output has enough."""


# A letter; an escape sequence that is complete; or an escape that begins none.
_ONE_KEY = re.compile(
    rb"[\x00-\x1a\x1c-\x7f]|[\xc2-\xf4][\x80-\xbf]{1,3}(?![\x80-\xbf])|[\x80-\xff](?=[^\x80-\xbf])"
    rb"|\x1b(?:\[[0-?]*[ -/]*[@-~]|O[@-~]|(?=[^\[O]|\[[0-?]*[ -/]*[^ -~]|O[^@-~]))"
)


class _Quit(Exception):
    """Somebody pressed a key that ends it."""


_Inbox = queue.SimpleQueue[_Heard | bytes]


class _View:
    """Shows a status. `gone`: it is an old one, as the daemon is gone."""

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        raise NotImplementedError

    def press(self, key: bytes) -> None:
        """Take a key, where there is a keyboard. Errors: _Quit."""


def watch(socket: Path, console: Console, *, want_json: bool = False) -> None:
    """Show the status until q or Ctrl-C.

    Errors: those of `rkcached status` if there is no daemon at first; BrokenPipeError.
    """
    ended = contextlib.suppress(KeyboardInterrupt, _Quit)
    with Client(socket, patience_s=_ANSWER_S) as client, ended:
        status = client.status()
        inbox: _Inbox = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(socket, inbox), daemon=True).start()
        if sys.stdout is not None:  # it is None where the caller closed it
            threading.Thread(
                target=_await_closed, args=(sys.stdout.fileno(), inbox), daemon=True
            ).start()

        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
        )  # the terminal is put right
        if want_json:
            _follow(client, inbox, status, _Documents(), tick_s=None)
        elif not console.is_terminal or console.is_dumb_terminal:
            _follow(client, inbox, status, _Changes(console), tick_s=None)
        else:
            with Live(console=console, screen=True, auto_refresh=False) as live, _keys(inbox):
                _follow(client, inbox, status, _Screen(live), tick_s=_TICK_S)


def _follow(
    client: Client, inbox: _Inbox, status: dict[str, Any], view: _View, *, tick_s: float | None
) -> None:
    """Until someone quits. Errors: _Quit, BrokenPipeError.

    `tick_s`: show it again after this long without news; None: news only.
    """
    view.show(status, gone=False)
    gone = due = False
    asked = time.monotonic()
    pace_s = _PACE_S

    while True:
        wait_s = tick_s
        if due:
            wait_s = max(0.0, asked + pace_s - time.monotonic())

        pressed = False
        for news in _hear(inbox, wait_s):
            if news is _Heard.CLOSED:
                raise BrokenPipeError

            if isinstance(news, bytes):
                view.press(news)
                pressed = True
            else:
                gone = news is _Heard.GONE
                due = not gone

        since_asked = time.monotonic() - asked
        if tick_s and not gone:
            due = due or _moving(status) or since_asked >= _IDLE_S
        if due and not pressed:
            if since_asked < pace_s:
                continue

            asked = time.monotonic()
            # While the event stream goes on, a daemon that does not answer is only busy.
            answer = _answer(client)
            gone = due = answer is None
            pace_s = _TICK_S if gone else _PACE_S
            status = answer or status

        view.show(status, gone=gone)


def _answer(client: Client) -> dict[str, Any] | None:
    try:
        return client.status()
    except RkcachedError:
        return None


def _hear(inbox: _Inbox, wait_s: float | None) -> Iterator[_Heard | bytes]:
    """The news: waits for the first, takes the others that are there."""
    with contextlib.suppress(queue.Empty):
        yield inbox.get(timeout=wait_s)
        while True:
            yield inbox.get_nowait()


def _moving(status: dict[str, Any]) -> bool:
    """Something happens of which there are no events."""
    return bool(status["running"] or status["building"] or not status["ready"])


def _listen(socket: Path, inbox: _Inbox) -> None:
    """Report each event, of the daemon's end, and of its return."""
    for heard in follow(socket):
        inbox.put(_Heard.GONE if isinstance(heard, RkcachedError) else _Heard.CHANGE)


def _await_closed(output: int, inbox: _Inbox) -> None:
    """Report when a pipe's reader is gone: the next line would find out, and may be hours away."""
    poll = select.poll()
    poll.register(output, 0)  # errors and the end are always reported
    poll.poll()
    inbox.put(_Heard.CLOSED)


@contextlib.contextmanager
def _keys(inbox: _Inbox) -> Iterator[None]:
    """Meanwhile keys go to the view; they are neither shown nor left to the shell."""
    if not sys.stdin.isatty():
        yield
        return

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def read() -> None:
        typed = b""
        while True:
            if typed and not select.select([stdin], [], [], _ESCAPE_S)[0]:
                inbox.put(typed)
                typed = b""
            if not (data := os.read(stdin, 1024)):
                return

            keys, typed = split_keys(typed + data)
            for key in keys:
                inbox.put(key)

    tty.setcbreak(stdin)
    threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSAFLUSH, before)


def split_keys(typed: bytes) -> tuple[list[bytes], bytes]:
    """The keys, and the beginning of an escape sequence of which more will come."""
    keys = []
    at = 0
    while key := _ONE_KEY.match(typed, at):
        keys.append(key[0])
        at = key.end()
    return keys, typed[at:]


class _Documents(_View):
    """--json: a line of JSON for each change."""

    def __init__(self) -> None:
        self._known: object = None

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        known: object = (facts_of(status), status["cache"]["used_bytes"])
        document: Mapping[str, object] = status
        if gone:
            end: forms.Gone = {"format": 1, "gone": True}
            document = end
            known = "gone"

        if known != self._known:
            print(output.json_text(document), flush=True)  # noqa: T201 - for a program

        self._known = known


class _Changes(_View):
    """For pipes, files and dumb terminals: the whole once, then a line for each change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._facts: dict[str, str] | None = None
        self._gone = False

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        if gone:
            if not self._gone:
                self._say([GONE])
            self._facts = None
        else:
            facts = facts_of(status)
            if self._facts is None:
                whole = f"{words.when(time.time())}\n{self._whole(status)}"
                print(whole, flush=True)  # noqa: T201 - as it is
            else:
                self._say(changes(self._facts, facts))
            self._facts = facts

        self._gone = gone

    def _whole(self, status: dict[str, Any]) -> str:
        with self._console.capture() as captured:
            show.print_status(self._console, status, stays=True)
        return captured.get()

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            dated = f"{words.when(time.time())} {line}"
            print(dated, flush=True)  # noqa: T201 - without wrapping or markup


def facts_of(status: dict[str, Any]) -> dict[str, str]:
    """All that is worth a line when it changes, by what it is about.

    What changes by itself is left out.
    """
    status = words.shown(status)
    facts = {words.name_of(prompt): _prompt_line(prompt) for prompt in status["prompts"]}
    for model in status["models"]:
        facts[f"model {model['name']}"] = show.model_line(
            {**model, "state_s": 0}, with_usage=False
        ).plain

    problems = "; ".join(status["manifest"]["problems"])
    trouble = status["cache"]["trouble"]
    facts |= {
        "daemon": show.daemon_line(status, age=f"since {words.when(status['started_at'])}").plain,
        "manifest": f"{words.REJECTED}: {problems}" if problems else "manifest: in force",
        "store": f"the store cannot be read: {trouble}" if trouble else "store: readable",
        "watching": f"watching: {status['watching']}",
        "warnings": f"warnings: {'; '.join(status['notices']) or 'none'}",
        "answers": f"answers: {words.answers_of(status)}",
        "summary": words.summary_of(status),
    }

    return facts


def _prompt_line(prompt: dict[str, Any]) -> str:
    artifact = None
    if prompt["state"] == "fresh":
        artifact = prompt.get("artifact")

    figures = ""
    if artifact:
        tokens = words.number(artifact["tokens"])
        figures = f", {tokens} tokens, {words.size(artifact['size_bytes'])}"

    if artifact and artifact["verified"] != "off":
        cold = words.milliseconds(artifact["cold_ttft_ms"])
        warm = words.milliseconds(artifact["warm_ttft_ms"])
        figures += f", cold {cold}, warm {warm}"

    reason = brief_reason(prompt)
    line = f"{words.name_of(prompt)} {words.state_of(prompt)}{figures}"
    if reason:
        line += f": {reason}"
    return line


def changes(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """A line for each fact that is new, another or gone."""
    for about, fact in now.items():
        if before.get(about) != fact:
            yield fact
    for about in before:
        if about not in now:
            yield f"{about}: no longer there"


class _Screen(_View):
    """A terminal, on which somebody browses."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._browsing = Browsing()
        self._page = 1
        self._raw: dict[str, Any] = {}
        self._shown: dict[str, Any] = {"prompts": []}
        self._shown_at = 0.0
        self._drawn: tuple[object, ...] = ()

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        drawn = (id(status), gone, self._browsing, self._live.console.size)
        if gone and drawn == self._drawn:
            return  # it is asked four times a second whether it is there again
        self._drawn = drawn
        if status is not self._raw:
            self._raw = status
            self._shown = words.shown(status)
            self._shown_at = time.time()

        seen = picture(
            self._shown,
            self._live.console,
            browsing=self._browsing,
            keys=sys.stdin.isatty(),
            old_since=self._shown_at if gone else None,
        )
        self._browsing = replace(self._browsing, first=seen.first)
        self._page = max(1, seen.count)
        self._live.update(Group(*seen.parts), refresh=True)

    def press(self, key: bytes) -> None:
        rows = self._browsing.rows(self._shown["prompts"])
        browsing = self._browsing.pressed(key, rows, self._page)
        if browsing is None:
            raise _Quit
        self._browsing = browsing
