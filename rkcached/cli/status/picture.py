"""Draws a status as it fits on a terminal, for `rkcached status --watch`. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from rkcached.api import words
from rkcached.cli.status import show

GONE = "daemon gone, waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    parts: list[RenderableType]
    first: int
    """The first prompt that is seen, from 0."""
    count: int
    """The number of prompts that are seen."""


def picture(
    status: dict[str, Any],
    console: Console,
    *,
    gone: bool = False,
    first: int = 0,
    scrolls: bool = True,
) -> Picture:
    """Draw what fits of a status as `words.shown` gives it: troubles, then prompts from `first` on.

    Prompts that need attention come first, then what is being built, then the others.
    """
    width, height = console.size
    head = _head(status, console, gone=gone)
    if not status["prompts"]:
        return Picture(parts=[*head, show.no_prompts(status)], first=0, count=0)

    prompts = show.urgent_first(status["prompts"])
    notes = _Notes(prompts, console)
    room = height - len(head) - 1
    if notes.that_fit(prompts, room) < len(prompts):
        room -= 1

    first = max(0, min(first, len(prompts) - notes.that_fit(reversed(prompts), room)))
    count = notes.that_fit(itertools.islice(prompts, first, None), room)
    seen = prompts[first : first + count]
    parts: list[RenderableType] = [*head]
    parts.append(show.prompt_table(seen, width, notes=width >= show.WIDE, overflow="ellipsis"))
    parts += notes.below(seen)[: max(0, room - count)]

    if count < len(prompts):
        span = f"{first + 1}-{first + count}" if count > 1 else f"{first + 1}"
        last = Text(
            f"prompts {span} of {len(prompts)}" + (", arrows scroll" if scrolls else ""),
            style="dim",
        )
        last.truncate(width, overflow="ellipsis")
        parts.append(last)

    return Picture(parts=parts, first=first, count=count)


class _Notes:
    """Troubles of prompts, in lines below their table, where that has no room for notes."""

    def __init__(self, prompts: Sequence[dict[str, Any]], console: Console) -> None:
        self._console = console
        self._counts = Counter[str]()
        if console.width < show.WIDE:
            self._counts.update(map(brief_reason, prompts))

    def below(self, prompts: Sequence[dict[str, Any]]) -> list[Text]:
        """Each reason once, in at most three lines."""
        if not self._counts:
            return []

        lines: list[Text] = []
        for note in show.notes_of(prompts, self._counts, brief_reason):
            text = Text(": ".join(note), style="dim")
            lines += _wrapped(text, self._console)[:3]

        return lines

    def that_fit(self, prompts: Iterable[dict[str, Any]], lines: int) -> int:
        """Count the prompts that fit with their notes, at least one."""
        noted = {""}
        count = 0
        for prompt in prompts:
            lines -= 1
            if (reason := brief_reason(prompt)) not in noted:
                noted.add(reason)
                lines -= len(self.below([prompt]))
            if lines < 0:
                break
            count += 1

        return max(1, count)


def brief_reason(prompt: dict[str, Any]) -> str:
    """Without figures that only this prompt has, so that those of many prompts are the same."""
    reason = words.reason_of(prompt)
    if reason.startswith("no gain: "):
        return "no gain, see cold and warm"
    return reason


def _wrapped(text: Text, console: Console) -> list[Text]:
    return list(text.wrap(console, console.width))


def _head(status: dict[str, Any], console: Console, *, gone: bool) -> list[Text]:
    """All above the prompts, in at most half of the lines; the least important goes first."""
    width, height = console.size
    ascii_only = console.options.ascii_only
    models = [(1 if model["trouble"] else 5, show.model_line(model)) for model in status["models"]]
    queue = _queue(status)
    lines = [
        *((0, line) for line in _troubles(status, console, most=max(3, height // 3))),
        (6, show.daemon_line(status, age=show.since(status["started_at"]))),
        (0, Text(words.summary_of(status), style="bold")),
        (7, Text(f"engine {status['engine']}, answers: {show.answers_of(status)}")),
        *models,
        (3, queue),
        (4, _disk(status, ascii_only=ascii_only)),
        *((6, line) for line in _times(status, width, ascii_only=ascii_only)),
        *((2, line) for line in _build(status, ascii_only=ascii_only)),
        (8, Text()),
    ]
    if gone:
        lines.insert(0, (0, Text(f"{GONE}; this is how it was", style="bold reverse")))

    by_weight = sorted(range(len(lines)), key=lambda at: lines[at][0])
    kept = [lines[at][1] for at in sorted(by_weight[: max(2, height // 2)])]
    if hidden := sum(not any(line is kept_line for kept_line in kept) for _, line in models):
        queue.append(f"; {hidden} of {len(models)} models are not shown")

    for line in kept:
        line.truncate(width, overflow="ellipsis")
    return kept


def _troubles(status: dict[str, Any], console: Console, *, most: int) -> list[Text]:
    """Whole, over several lines where that is needed.

    How much is left out if there are more than `most`.
    """
    lines = [line for trouble in show.troubles(status) for line in _wrapped(trouble, console)]
    if len(lines) > most:
        left = len(lines) - most + 1
        lines[most - 1 :] = [
            Text(f"{left} more lines: `rkcached status`, `rkcached check`", style="bold red")
        ]

    return lines


def _queue(status: dict[str, Any]) -> Text:
    waiting = sum(model["waiting"] for model in status["models"])
    return Text(f"queue   {status['running'] - waiting} running, {waiting} waiting")


def _disk(status: dict[str, Any], *, ascii_only: bool) -> Text:
    used = status["cache"]["used_bytes"]
    limit = status["cache"]["max_bytes"]
    bar = ""
    if limit:
        bar = f"{_bar(used / limit, ascii_only=ascii_only)} "
    return Text(
        f"disk    {bar}{show.used_of(status)}", style="yellow" if limit and used > limit else ""
    )


def _times(status: dict[str, Any], width: int, *, ascii_only: bool) -> Iterator[Text]:
    """The last times to the first token, as many as there is room for beside their medians."""
    times = [answer["ttft_ms"] for answer in status["recent"]]
    if times:
        text = "; ".join(filter(None, (f"last {times[-1]:.0f} ms", words.medians_of(status))))
        room = max(0, width - len("TTFT    ") - len(text) - 1)
        line = ""
        if room:
            line = show.sparkline(times[-room:], ascii_only=ascii_only)
        yield Text(f"TTFT    {line} {text}" if line else f"TTFT    {text}")


def _build(status: dict[str, Any], *, ascii_only: bool) -> Iterator[Text]:
    if prompt := status["building"]:
        progress = prompt["progress"]
        done = progress["done_tokens"]
        total = progress["total_tokens"]
        bar = ""
        if total:
            bar = f"{_bar(done / total, ascii_only=ascii_only)} {done} of {total} tokens, "

        yield Text(
            f"build   {bar}{progress['elapsed_ms'] / 1000:.0f} s, {show.name_of(prompt)}",
            style="cyan",
        )


def _bar(share: float, *, ascii_only: bool, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    done, left = ("#", ".") if ascii_only else ("█", "░")
    return done * full + left * (width - full)
