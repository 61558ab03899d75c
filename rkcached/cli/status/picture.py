"""Draws a status as it fits on a terminal, for `rkcached status --watch`. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, RenderableType
from rich.styled import Styled
from rich.text import Text

from rkcached.api import words
from rkcached.cli.status import show
from rkcached.cli.status.browsing import HELP, Browsing
from rkcached.errors import printable
from rkcached.plan.vocabulary import STATES, tone_of

GONE = "daemon gone, waiting"

_NOTHING_CHOSEN = Browsing()


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
    browsing: Browsing = _NOTHING_CHOSEN,
    keys: bool = True,
    old_since: float | None = None,
) -> Picture:
    """Draw what fits of a status as `words.shown` gives it: troubles, then what is browsed.

    `keys`: somebody can press keys.
    `old_since`: the status is of this Unix time, as the daemon does not answer any more.
    """
    width, height = console.size
    head = _head(status, console, old_since=old_since)
    room = height - len(head) - 1
    rows = browsing.rows(status["prompts"])

    if browsing.help:
        drawn = Picture(parts=_help(width)[: room + 1], first=browsing.first, count=0)
    elif browsing.opened and rows:
        chosen = rows[browsing.row_in(rows)]
        lines = [part for line in _details(chosen) for part in _wrapped(line, console)]
        drawn = Picture(
            parts=[*lines[:room], _last_line("Esc: the list", width)], first=browsing.first, count=0
        )
    elif not status["prompts"]:
        drawn = Picture(parts=[show.no_prompts(status)], first=0, count=0)
    else:
        drawn = _list(rows, status, console, browsing, room=room - 1, keys=keys)

    parts = [*head, *drawn.parts]
    if old_since is not None:
        parts = [parts[0], *(Styled(part, "dim") for part in parts[1:])]
    return replace(drawn, parts=parts)


def _list(
    rows: Sequence[dict[str, Any]],
    status: dict[str, Any],
    console: Console,
    browsing: Browsing,
    *,
    room: int,
    keys: bool,
) -> Picture:
    """Draw the prompts around the chosen one that fit into `room` lines, and a line on them."""
    notes = _Notes(rows, console)
    chosen = browsing.row_in(rows)
    last_first = len(rows) - notes.that_fit(reversed(rows), room)
    up_to_chosen = notes.that_fit(reversed(rows[: chosen + 1]), room)
    first = max(0, chosen - up_to_chosen + 1, min(browsing.first, chosen, last_first))

    count = notes.that_fit(itertools.islice(rows, first, None), room)
    seen = rows[first : first + count]
    parts: list[RenderableType] = []
    if seen:
        width = console.width
        marked = chosen - first if keys else None
        parts.append(
            show.prompt_table(
                seen, width, notes=width >= show.WIDE, overflow="ellipsis", marked=marked
            )
        )
        parts += notes.below(seen)[: max(0, room - len(seen))]

    about = _about_list(rows, status, browsing, first=first, count=len(seen), keys=keys)
    if about:
        parts.append(_last_line(about, console.width))
    return Picture(parts=parts, first=first, count=len(seen))


def _about_list(
    rows: Sequence[dict[str, Any]],
    status: dict[str, Any],
    browsing: Browsing,
    *,
    first: int,
    count: int,
    keys: bool,
) -> str:
    """Say which prompts are seen, why these, and how to choose others."""
    if browsing.typing:
        return f"/{browsing.query}_  Enter keeps the search, Esc ends it"

    parts = []
    if count < len(rows):
        span = f"{first + 1:,}-{first + count:,}" if count > 1 else f"{first + 1:,}"
        parts.append(f"prompts {span} of {len(rows):,}")
    if browsing.query:
        fitting = f"{len(rows):,} of {len(status['prompts']):,}"
        parts.append(f"{fitting} fit /{printable(browsing.query)}")
    if browsing.order != Browsing().order:
        parts.append(f"sorted by {browsing.order}")
    if keys:
        parts.append("? for keys")
    return ", ".join(parts)


def _last_line(text: str, width: int) -> Text:
    line = Text(text, style="dim")
    line.truncate(width, overflow="ellipsis")
    return line


def _help(width: int) -> list[RenderableType]:
    broadest = max(map(len, HELP))
    return [_last_line(f"{keys:<{broadest}}  {what}", width) for keys, what in HELP.items()]


def _details(prompt: dict[str, Any]) -> Iterator[Text]:
    """All that a status has about one prompt."""
    state = prompt["state"]
    yield Text.assemble(
        (words.name_of(prompt), "bold"),
        ": ",
        (words.state_of(prompt), show.style_of(tone_of(state))),
    )
    meaning = STATES[state].meaning
    yield Text(meaning, style="dim")
    if progress := prompt.get("progress"):
        seconds = words.number(progress["elapsed_ms"] / 1000)
        yield Text(f"build      {words.done_of(progress)}, {seconds} s")

    lines = {
        "reason": prompt["reason"],
        "next step": prompt["hint"],
        "about": prompt["description"],
        "tools": ", ".join(prompt["tools"]),
    }
    if prompt["retry_at"] is not None:
        lines["retried"] = words.when(prompt["retry_at"])
    if artifact := prompt.get("artifact"):
        tokens = words.number(artifact["tokens"])
        size = words.size(artifact["size_bytes"])
        seconds = words.number(artifact["build_ms"] / 1000)
        lines["cache"] = f"{tokens} tokens, {size}"
        came = f"{words.when(artifact['built_at'])}, in {seconds} s"
        if imported := artifact["imported"]:
            came = f"elsewhere, imported {words.when(imported['at'])}"
        lines["built"] = came
        if artifact["verified"] != "off":
            cold = words.milliseconds(artifact["cold_ttft_ms"])
            warm = words.milliseconds(artifact["warm_ttft_ms"])
            lines["TTFT"] = f"{cold} cold, {warm} warm (verified: {artifact['verified']})"
        lines["identity"] = artifact["fingerprint"]

    lines["hits"] = words.hits_of(prompt)
    if prompt["last_used"] is not None:
        lines["last used"] = words.when(prompt["last_used"])

    for name, text in lines.items():
        if text:
            yield Text(f"{name:<10} {text}")


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


def _head(status: dict[str, Any], console: Console, *, old_since: float | None) -> list[Text]:
    """All above the prompts, in at most half of the lines; the least important goes first."""
    width, height = console.size
    ascii_only = console.options.ascii_only
    models = [(1 if model["trouble"] else 5, show.model_line(model)) for model in status["models"]]
    queue = _queue(status)
    lines = [
        *((0, line) for line in _errors(status, console, most=max(3, height // 3))),
        *((2, line) for line in show.warnings(status, width, whole=False)),
        (6, show.daemon_line(status, age=show.since(status["started_at"]))),
        (0, Text(words.summary_of(status), style="bold")),
        (7, Text(f"engine {status['engine']}, answers: {words.answers_of(status)}")),
        *models,
        (3, queue),
        (4, _disk(status, ascii_only=ascii_only)),
        *((7, Text(line, style="dim")) for line in filter(None, [words.retired_of(status)])),
        *((6, line) for line in _times(status, width, ascii_only=ascii_only)),
        *((2, line) for line in _build(status, ascii_only=ascii_only)),
        (8, Text()),
    ]
    if old_since is not None:
        old = f"{GONE}; the figures are of {words.when(old_since)}"
        lines.insert(0, (0, Text(old, style="bold reverse")))

    by_weight = sorted(range(len(lines)), key=lambda at: lines[at][0])
    kept = [lines[at][1] for at in sorted(by_weight[: max(2, height // 2)])]
    if hidden := sum(not any(line is kept_line for kept_line in kept) for _, line in models):
        queue.append(f"; {hidden} of {len(models)} models are not shown")

    for line in kept:
        line.truncate(width, overflow="ellipsis")
    return kept


def _errors(status: dict[str, Any], console: Console, *, most: int) -> list[Text]:
    """Whole, over several lines where that is needed.

    How much is left out if there are more than `most`.
    """
    lines = [line for error in show.errors(status) for line in _wrapped(error, console)]
    if len(lines) > most:
        left = len(lines) - most + 1
        lines[most - 1 :] = [
            Text(f"{left} more lines: `rkcached status`, `rkcached check`", style="bold red")
        ]

    return lines


def _queue(status: dict[str, Any]) -> Text:
    waiting = sum(model["waiting"] for model in status["models"])
    running = status["running"] - waiting
    return Text(f"queue   {words.number(running)} running, {words.number(waiting)} waiting")


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
        text = "; ".join(
            filter(None, (f"last {words.milliseconds(times[-1])}", words.medians_of(status)))
        )
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
            bar = f"{_bar(done / total, ascii_only=ascii_only)} {words.done_of(progress)}, "

        yield Text(
            f"build   {bar}{words.number(progress['elapsed_ms'] / 1000)} s, "
            f"{words.name_of(prompt)}",
            style="cyan",
        )


def _bar(share: float, *, ascii_only: bool, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    done, left = ("#", ".") if ascii_only else ("█", "░")
    return done * full + left * (width - full)
