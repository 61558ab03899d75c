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
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from rich.console import Console, Group
from rich.live import Live

from rkcached.api import words
from rkcached.cli import output
from rkcached.cli.client import Client, follow
from rkcached.cli.status import show
from rkcached.cli.status.picture import GONE, brief_reason, picture
from rkcached.errors import RkcachedError

if TYPE_CHECKING:
    from rkcached.cli import forms

# Between two looks: nobody reads faster, and a busy daemon has better things to do.
_PACE_S = 0.25

_TICK_S = 1.0
_ANSWER_S = 5.0


class _Heard(Enum):
    CHANGE = auto()
    GONE = auto()
    QUIT = auto()
    CLOSED = auto()
    """Whoever read our output has enough."""


class Move(Enum):
    """A move in the list of prompts."""

    UP = auto()
    DOWN = auto()
    PAGE_UP = auto()
    PAGE_DOWN = auto()
    TOP = auto()
    BOTTOM = auto()


_KEYS: dict[bytes, Move | _Heard] = {
    **dict.fromkeys((b"q", b"Q"), _Heard.QUIT),
    **dict.fromkeys((b"k", b"\x1b[A", b"\x1bOA"), Move.UP),
    **dict.fromkeys((b"j", b"\x1b[B", b"\x1bOB"), Move.DOWN),
    **dict.fromkeys((b"\x1b[5~",), Move.PAGE_UP),
    **dict.fromkeys((b" ", b"\x1b[6~"), Move.PAGE_DOWN),
    **dict.fromkeys((b"g", b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"\x1b[7~"), Move.TOP),
    **dict.fromkeys((b"G", b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"\x1b[8~"), Move.BOTTOM),
}

# A letter; an escape sequence that is complete; or an escape that begins none.
_ONE_KEY = re.compile(
    rb"[^\x1b]|\x1b(?:\[[0-?]*[ -/]*[@-~]|O[@-~]|(?=[^\[O]|\[[0-?]*[ -/]*[^ -~]|O[^@-~]))"
)

_Inbox = queue.SimpleQueue[_Heard | Move]


class _View:
    """Shows a status. `gone`: it is an old one, as the daemon is gone."""

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        raise NotImplementedError

    def move(self, move: Move) -> None:
        """Nothing, where nothing scrolls."""


def watch(socket: Path, console: Console, *, want_json: bool = False) -> None:
    """Show the status until q or Ctrl-C.

    Errors: those of `rkcached status` if there is no daemon at first; BrokenPipeError.
    """
    with Client(socket, patience_s=_ANSWER_S) as client, contextlib.suppress(KeyboardInterrupt):
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
    """Until someone quits.

    `tick_s`: show it again after this long without news; None: news only.
    """
    view.show(status, gone=False)
    gone = due = False
    asked = 0.0

    while True:
        wait_s = tick_s
        if due:
            wait_s = max(0.0, asked + _PACE_S - time.monotonic())

        moved = False
        for news in _hear(inbox, wait_s):
            if news is _Heard.QUIT:
                return
            if news is _Heard.CLOSED:
                raise BrokenPipeError

            if isinstance(news, Move):
                view.move(news)
                moved = True
            else:
                gone = news is _Heard.GONE
                due = not gone

        if moved or gone or not (due or (tick_s and _moving(status))):
            view.show(status, gone=gone)
            continue

        if time.monotonic() < asked + _PACE_S:
            continue

        due = False
        asked = time.monotonic()
        try:
            status = client.status()
        except RkcachedError:
            gone = True

        view.show(status, gone=gone)


def _hear(inbox: _Inbox, wait_s: float | None) -> Iterator[_Heard | Move]:
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
    """Meanwhile keys move and end the view; other keys are neither shown nor left to the shell."""
    if not sys.stdin.isatty():
        yield
        return

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def read() -> None:
        typed = b""
        while data := os.read(stdin, 1024):
            keys, typed = split_keys(typed + data)
            for key in keys:
                if key in _KEYS:
                    inbox.put(_KEYS[key])

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
                whole = f"{show.when(time.time())}\n{self._whole(status)}"
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
            dated = f"{show.when(time.time())} {line}"
            print(dated, flush=True)  # noqa: T201 - without wrapping or markup


def facts_of(status: dict[str, Any]) -> dict[str, str]:
    """All that is worth a line when it changes, by what it is about.

    What changes by itself is left out.
    """
    status = words.shown(status)
    facts = {show.name_of(prompt): _prompt_line(prompt) for prompt in status["prompts"]}
    for model in status["models"]:
        facts[f"model {model['name']}"] = show.model_line({**model, "state_s": 0}).plain

    problems = "; ".join(status["manifest"]["problems"])
    trouble = status["cache"]["trouble"]
    facts |= {
        "daemon": show.daemon_line(status, age=f"since {show.when(status['started_at'])}").plain,
        "manifest": f"{show.REJECTED}: {problems}" if problems else "manifest: in force",
        "store": f"the store cannot be read: {trouble}" if trouble else "store: readable",
        "watching": f"watching: {status['watching']}",
        "answers": f"answers: {show.answers_of(status)}",
        "summary": words.summary_of(status),
    }

    return facts


def _prompt_line(prompt: dict[str, Any]) -> str:
    artifact = None
    if prompt["state"] == "fresh":
        artifact = prompt.get("artifact")

    figures = ""
    if artifact:
        figures = f", {artifact['tokens']} tokens, {words.size(artifact['size_bytes'])}"

    if artifact and artifact["verified"] != "off":
        figures += (
            f", cold {artifact['cold_ttft_ms']:.0f} ms, warm {artifact['warm_ttft_ms']:.0f} ms"
        )

    reason = brief_reason(prompt)
    line = f"{show.name_of(prompt)} {prompt['state']}{figures}"
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
    """A terminal, of which one part scrolls."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._first = 0
        self._page = 1
        self._raw: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}

    def show(self, status: dict[str, Any], *, gone: bool) -> None:
        if status is not self._raw:
            self._raw = status
            self._shown = words.shown(status)

        seen = picture(
            self._shown,
            self._live.console,
            gone=gone,
            first=self._first,
            scrolls=sys.stdin.isatty(),
        )
        self._first = seen.first
        self._page = max(1, seen.count)
        self._live.update(Group(*seen.parts), refresh=True)

    def move(self, move: Move) -> None:
        match move:
            case Move.UP:
                self._first -= 1
            case Move.DOWN:
                self._first += 1
            case Move.PAGE_UP:
                self._first -= self._page
            case Move.PAGE_DOWN:
                self._first += self._page
            case Move.TOP:
                self._first = 0
            case Move.BOTTOM:
                self._first = sys.maxsize
            case _:
                assert_never(move)
