"""Tables and lines that a person likes to read, from the same data that --json prints."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, OverflowMethod
from rich.table import Table
from rich.text import Text

from rkcached.api import words
from rkcached.errors import counted
from rkcached.plan.vocabulary import STATES, Tone, tone_of, urgency

WIDE = 110
"""Columns from which the table has room for notes; on a narrower terminal they follow it."""

# Columns that a name keeps before figures have room; fewer where no name is so long.
_NAME_WIDTH = 24

# The columns of figures. The last ones give way first.
_FIGURES = ("cold", "warm", "hits", "tokens", "size")

_STYLES = {
    Tone.GOOD: "green",
    Tone.WORK: "cyan",
    Tone.WARN: "yellow",
    Tone.BAD: "red",
    Tone.QUIET: "dim",
}


def style_of(tone: Tone) -> str:
    """The colour of a word at a terminal."""
    return _STYLES[tone]


def print_status(
    console: Console, status: dict[str, Any], *, stays: bool = False, verbose: bool = False
) -> None:
    """The status as it is now.

    `stays`: it is read later, too, so it has nothing that changes by itself. `verbose`: all
    warnings, and what each state means.
    """
    status = words.shown(status)
    prompts = urgent_first(status["prompts"])
    wide = console.width >= WIDE

    # In a file or a pipe nothing is pushed off a screen.
    whole = verbose or not console.is_terminal
    for line in (*errors(status), *warnings(status, console.width, whole=whole)):
        console.print(line)
    for line in _heading(status, stays=stays):
        console.print(line)
    if retired := words.retired_of(status):
        console.print(Text(retired, style="dim"))

    if not prompts:
        console.print(no_prompts(status))
        return

    console.print(prompt_table(prompts, console.width, notes=wide))
    for who, note in (
        () if wide else notes_of(prompts, Counter(map(words.note_of, prompts)), words.note_of)
    ):
        console.print(Text(f"{who}: {note}", style="dim"))

    if verbose:
        for state in dict.fromkeys(prompt["state"] for prompt in prompts):
            console.print(Text(f"{state}: {STATES[state].meaning}", style=style_of(tone_of(state))))


def errors(status: dict[str, Any]) -> Iterator[Text]:
    for line in words.errors_of(status):
        yield Text(line, style="bold red")


def warnings(status: dict[str, Any], width: int, *, whole: bool) -> Iterator[Text]:
    """Each warning, or one line for all, with the command that shows them whole."""
    lines = list(words.warnings_of(status))
    if not whole and (len(lines) > 1 or any(cell_len(line) > width for line in lines)):
        count = counted(len(lines), "warning")
        lines = [f"{count} (`rkcached status -v`): {lines[0]}"]

    for line in lines:
        text = Text(line, style="yellow")
        if not whole:
            text.truncate(width, overflow="ellipsis")
        yield text


def no_prompts(status: dict[str, Any]) -> Text:
    return Text(words.no_prompts(status), style="dim")


def is_declared(prompt: dict[str, Any]) -> bool:
    """Whether somebody declared it: not only the store has it, nor did the daemon learn it."""
    return prompt["state"] not in ("orphan", "retired") and not prompt["learned"]


def all_fresh(status: dict[str, Any]) -> bool:
    """Whether the daemon knows what is declared, and all of it is fresh.

    Where the files of a prompts_from folder are gone, it does not.
    """
    prompts = filter(is_declared, status["prompts"])
    troubled = any(model["trouble"] or model["notices"] for model in status["models"])
    known = status["ready"] and status["manifest"]["ok"] and not troubled
    return known and all(prompt["state"] == "fresh" for prompt in prompts)


def urgent_first(prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order for people: what needs somebody comes first.

    --json keeps the manifest's order.
    """
    return sorted(prompts, key=lambda prompt: urgency(prompt["state"]))


def prompt_table(
    prompts: Sequence[dict[str, Any]],
    width: int,
    *,
    notes: bool,
    overflow: OverflowMethod = "fold",
    marked: int | None = None,
) -> Table:
    """Name and state, and the figures for which `width` has room beside them.

    `marked`: the row that is chosen, from 0.
    """
    rows = [_row(prompt) for prompt in prompts]
    one_line = overflow != "fold"
    figures = _that_fit(rows, width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    # On a narrow terminal names and notes give way, as these columns may wrap; figures do not.
    table.add_column(
        "prompt", min_width=min(_NAME_WIDTH, max(cell_len(row["prompt"]) for row in rows))
    )
    table.add_column("state", no_wrap=True)

    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    if notes:
        table.add_column("note", style="dim")

    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        cells = [
            Text(row["prompt"], overflow=overflow, no_wrap=one_line),
            Text(row["state"], style=style_of(tone_of(prompt["state"]))),
        ]
        cells += [Text(row[name]) for name in figures]
        if notes:
            cells.append(Text(words.note_of(prompt), overflow=overflow, no_wrap=one_line))
        table.add_row(*cells, style="reverse" if place == marked else "")

    return table


def _row(prompt: dict[str, Any]) -> dict[str, str]:
    row = dict.fromkeys(("tokens", "size", "cold", "warm"), "")
    row["prompt"] = words.name_of(prompt)
    row["state"] = words.state_of(prompt)
    row["hits"] = words.hits_of(prompt)

    if artifact := prompt.get("artifact"):
        row["tokens"] = words.number(artifact["tokens"])
        row["size"] = words.size(artifact["size_bytes"])
        if artifact["verified"] != "off":
            row["cold"] = words.milliseconds(artifact["cold_ttft_ms"])
            row["warm"] = words.milliseconds(artifact["warm_ttft_ms"])

    return row


def _that_fit(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """The columns of figures beside names and states, as they stand in the table."""

    def wide(name: str) -> int:
        return max(len(name), *(cell_len(row[name]) for row in rows))

    left = width - min(wide("prompt"), _NAME_WIDTH) - 2 - wide("state")
    room = itertools.accumulate(2 + wide(name) for name in _FIGURES)
    fitting = [name for name, needed in zip(_FIGURES, room, strict=True) if needed <= left]
    return [name for name in ("tokens", "size", "cold", "warm", "hits") if name in fitting]


def _heading(status: dict[str, Any], *, stays: bool) -> Iterator[Text]:
    yield daemon_line(
        status,
        age=since(status["started_at"]) if stays else f"up {words.duration(status['uptime_s'])}",
    )
    yield Text(words.summary_of(status), style="bold")
    answers = words.answers_of(status)
    yield Text(f"engine {status['engine']}, cache {used_of(status)}, answers: {answers}")
    for model in status["models"]:
        yield model_line(model, with_usage=not stays)
    if suggestion := suggestion_line(status):
        yield Text(suggestion, style="cyan")


def suggestion_line(status: dict[str, Any]) -> str:
    """The beginning that is repeated at the highest cost; empty if nothing is."""
    if not status["suggestions"]:
        return ""

    first = status["suggestions"][0]
    more = ""
    if len(status["suggestions"]) > 1:
        more = f" (and {len(status['suggestions']) - 1} more)"
    return (
        f"model {first['model']}: {words.suggestion_of(first)}; "
        f"`rkcached suggest` says how to make a prompt of them{more}"
    )


def daemon_line(status: dict[str, Any], *, age: str) -> Text:
    return Text(f"rkcached {status['version']}, pid {status['pid']}, {age}")


def used_of(status: dict[str, Any]) -> str:
    """Size of the store, its limit, and free space on the disk."""
    cache = status["cache"]
    limit = ""
    if cache["max_bytes"]:
        limit = f" of {words.size(cache['max_bytes'])}"

    kinds = {
        "orphan": "orphan",
        "retired": "retired",
        "foreign": "not the store's",
        "quarantine": "quarantine",
    }
    shares = []
    for name, kind in kinds.items():
        if size_bytes := cache[f"{name}_bytes"]:
            shares.append(f"{words.size(size_bytes)} {kind}")

    text = f"{words.size(cache['used_bytes'])}{limit}"
    if shares:
        text += f" ({', '.join(shares)})"
    if cache["free_bytes"] is not None:
        text += f", disk has {words.size(cache['free_bytes'])} free"
    return text


def model_line(model: dict[str, Any], *, with_usage: bool = True) -> Text:
    """A model and its worker. `with_usage`: also what the worker uses, which changes by itself."""
    text = f"model {model['name']}: {words.worker_of(model)}"
    usage = words.usage_of(model)
    if with_usage and usage:
        text += f", {usage}"
    return Text(text, style="red" if model["trouble"] else "")


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """A letter for each value, the higher the larger; the largest fills its line."""
    steps = "▁▂▃▄▅▆▇█"
    if ascii_only:
        steps = "_.:-=+*#"
    top = max(values, default=0.0) or 1.0
    return "".join(steps[min(int(value / top * len(steps)), len(steps) - 1)] for value in values)


def notes_of(
    prompts: Sequence[dict[str, Any]],
    counts: Mapping[str, int],
    note: Callable[[dict[str, Any]], str],
) -> Iterator[tuple[str, str]]:
    """Each note of these prompts once, with the prompt's name or the number that have it."""
    for text, prompt in {note(prompt): prompt for prompt in prompts}.items():
        if text:
            yield words.name_of(prompt) if counts[text] == 1 else f"{counts[text]} prompts", text


def since(unix_seconds: float) -> str:
    """When it began: an hour and minute of today, or the day with them."""
    then = time.localtime(unix_seconds)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("since %H:%M" if today else "since %Y-%m-%d %H:%M", then)
