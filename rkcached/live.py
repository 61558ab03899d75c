"""`rkcached status --watch`: the daemon's state as it changes.

One thread hears the event stream, another the keyboard; both only tell the loop, which asks for the status when
something happened, at most four times a second. What has no event (tokens of a build, how long something takes) is
asked for once a second while there is any. A daemon that goes is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import statistics
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from rkcached import show
from rkcached.client import Client
from rkcached.errors import RkcachedError

_PACE_S = 0.25
"""Between two looks: nobody reads faster, and a busy daemon has better things to do."""

_TICK_S = 1.0
_RETRY_S = 0.5
_SILENCE_S = 40.0
"""The event stream has a sign of life every 15 s. One that is silent for longer belongs to nobody."""

_ANSWER_S = 5.0


class _Heard(Enum):
    CHANGE = auto()
    GONE = auto()
    QUIT = auto()


_Inbox = queue.SimpleQueue[_Heard]
_Show = Callable[[dict[str, Any], bool], None]
"""Shows a status; true: it is an old one, as the daemon is gone."""


def watch(socket: Path, console: Console, *, want_json: bool = False) -> None:
    """Show the status until q or Ctrl-C. Errors: those of `rkcached status` if there is no daemon at first."""
    with Client(socket, patience_s=_ANSWER_S) as client, contextlib.suppress(KeyboardInterrupt):
        status = client.status()
        inbox: _Inbox = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(socket, inbox), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the terminal is put right
        if not console.is_terminal or console.is_dumb_terminal or want_json:
            _follow(client, inbox, status, _Blocks(console, want_json=want_json), tick_s=None)
            return
        with Live(console=console, screen=True, auto_refresh=False) as screen, _keys(inbox):

            def draw(status: dict[str, Any], gone: bool) -> None:
                screen.update(Group(*picture(status, console, gone=gone)), refresh=True)

            draw(status, False)
            _follow(client, inbox, status, draw, tick_s=_TICK_S)


def _follow(client: Client, inbox: _Inbox, status: dict[str, Any], show_it: _Show, *, tick_s: float | None) -> None:
    """Until someone quits. `tick_s`: show it again after this long without news; None: news only."""
    gone = due = False
    asked = 0.0
    while True:
        wait_s = max(0.0, asked + _PACE_S - time.monotonic()) if due else tick_s
        for said in _hear(inbox, wait_s):
            if said is _Heard.QUIT:
                return
            gone = said is _Heard.GONE
            due = not gone
        if gone or not (due or (tick_s and _moving(status))):
            show_it(status, gone)
            continue
        if time.monotonic() < asked + _PACE_S:
            continue
        due, asked = False, time.monotonic()
        try:
            status = client.status()
        except RkcachedError:
            gone = True
        show_it(status, gone)


def _hear(inbox: _Inbox, wait_s: float | None) -> Iterator[_Heard]:
    """What was said: waits for the first, takes the others that are there."""
    with contextlib.suppress(queue.Empty):
        yield inbox.get(timeout=wait_s)
        while True:
            yield inbox.get_nowait()


def _moving(status: dict[str, Any]) -> bool:
    """Something happens of which there are no events."""
    return bool(status["running"]) or any(prompt.get("progress") for prompt in status["prompts"])


def _listen(socket: Path, inbox: _Inbox) -> None:
    """Tells of each event, of the daemon's end, and of its return."""
    while True:
        with contextlib.suppress(RkcachedError), Client(socket, patience_s=_SILENCE_S) as client:
            for _ in client.events():
                inbox.put(_Heard.CHANGE)
        inbox.put(_Heard.GONE)
        time.sleep(_RETRY_S)


@contextlib.contextmanager
def _keys(inbox: _Inbox) -> Iterator[None]:
    """Meanwhile q means the end; other keys are neither shown nor left to the shell."""
    if not sys.stdin.isatty():
        yield
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def read() -> None:
        while key := os.read(stdin, 1):
            if key in (b"q", b"Q"):
                inbox.put(_Heard.QUIT)

    tty.setcbreak(stdin)
    threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSAFLUSH, before)


class _Blocks:
    """For pipes, files and terminals that cannot go back: a block, or a line of JSON, for each change."""

    def __init__(self, console: Console, *, want_json: bool) -> None:
        self._console = console
        self._json = want_json
        self._said = ""

    def __call__(self, status: dict[str, Any], gone: bool) -> None:
        if gone:
            self._say("gone", json.dumps({"gone": True}) if self._json else f"{_GONE}\n")
        elif self._json:
            self._say(_text(self._console, {**status, "uptime_s": 0}), json.dumps(status, ensure_ascii=False))
        else:
            said = _text(self._console, status)
            self._say(said.partition("\n")[2], said)

    def _say(self, what: str, how: str) -> None:
        """Once, as long as it is `what`."""
        if what != self._said:
            self._said = what
            head = "" if self._json else f"{show.when(time.time())}\n"
            print(f"{head}{how}", flush=True)  # noqa: T201 - as it is, without wrapping or markup


def _text(console: Console, status: dict[str, Any]) -> str:
    with console.capture() as captured:
        show.print_status(console, status)
    return captured.get()


_GONE = "daemon gone, waiting"


def picture(status: dict[str, Any], console: Console, *, gone: bool = False) -> Iterator[RenderableType]:
    """What fits on the terminal: troubles first, and how much more there is."""
    ascii_only = console.options.ascii_only
    lines = [Text(f"{_GONE}; this is how it was", style="bold reverse")] if gone else []
    lines += [*show.status_heading(status), *_queue(status), *_disk(status, ascii_only=ascii_only)]
    lines += [*_times(status, ascii_only=ascii_only), *_build(status, ascii_only=ascii_only), Text()]
    for line in lines:
        line.truncate(console.width, overflow="ellipsis")
    yield from lines
    if not status["prompts"]:
        yield show.NO_PROMPTS
        return
    wide = console.width >= show.WIDE
    prompts = sorted(status["prompts"], key=lambda prompt: prompt["state"] == "fresh")
    notes = [[] if wide else _note(prompt, console) for prompt in prompts]
    count = _that_fit([1 + len(note) for note in notes], console.height - len(lines) - 2)
    yield show.prompt_table(prompts[:count], notes=wide, overflow="ellipsis")
    for note in notes[:count]:
        yield from note
    if left := prompts[count:]:
        fresh = ", all fresh" if all(prompt["state"] == "fresh" for prompt in left) else ""
        yield Text(f"{len(left)} more{fresh}", style="dim")


def _note(prompt: dict[str, Any], console: Console) -> list[Text]:
    """What is wrong with it, in at most three lines."""
    if not prompt["reason"]:
        return []
    note = Text(f"{prompt['model']}/{prompt['prompt']}: {show.note_of(prompt)}", style="dim")
    return list(note.wrap(console, console.width))[:3]


def _that_fit(heights: Sequence[int], lines: int) -> int:
    """How many of these fit, at least one; a line below them says what is left out."""
    count = sum(total <= lines for total in itertools.accumulate(heights))
    return max(1, count)


def _queue(status: dict[str, Any]) -> Iterator[Text]:
    waiting = sum(model["waiting"] for model in status["models"])
    yield Text(f"queue   {status['running'] - waiting} running, {waiting} waiting")


def _disk(status: dict[str, Any], *, ascii_only: bool) -> Iterator[Text]:
    used, limit = status["cache"]["used_bytes"], status["cache"]["max_bytes"]
    if limit:
        bar = _bar(used / limit, ascii_only=ascii_only)
        yield Text(f"disk    {bar} {show.size(used)} of {show.size(limit)}", style="yellow" if used > limit else "")


def _times(status: dict[str, Any], *, ascii_only: bool) -> Iterator[Text]:
    times = [one["ttft_ms"] for one in status["recent"]]
    if times:
        kinds = {"cached": ("hit", "loaded"), "cold": ("cold",)}
        by_kind = {
            kind: [one["ttft_ms"] for one in status["recent"] if one["state"] in states]
            for kind, states in kinds.items()
        }
        medians = [f"{kind} {statistics.median(values):.0f} ms" for kind, values in by_kind.items() if values]
        words = f"; medians: {', '.join(medians)}" if medians else ""
        yield Text(f"TTFT    {show.sparkline(times, ascii_only=ascii_only)} last {times[-1]:.0f} ms{words}")


def _build(status: dict[str, Any], *, ascii_only: bool) -> Iterator[Text]:
    for prompt in status["prompts"]:
        if progress := prompt.get("progress"):
            done, total = progress["done_tokens"], progress["total_tokens"]
            bar = f"{_bar(done / total, ascii_only=ascii_only)} {done} of {total} tokens, " if total else ""
            name = f"{prompt['model']}/{prompt['prompt']}"
            yield Text(f"build   {bar}{progress['elapsed_ms'] / 1000:.0f} s, {name}", style="cyan")


def _bar(share: float, *, ascii_only: bool, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    done, left = ("#", ".") if ascii_only else ("█", "░")
    return done * full + left * (width - full)
