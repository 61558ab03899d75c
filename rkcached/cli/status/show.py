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
from rkcached.plan.records import urgency

WIDE = 110
"""Columns from which the table has room for notes; on a narrower terminal they follow it."""

# Columns that a name keeps before figures have room; fewer where no name is so long.
_NAME_WIDTH = 24

# The columns of figures. The last ones give way first.
_FIGURES = ("cold", "warm", "hits", "tokens", "size")

# So many retired prompt caches are named.
_NAMED = 3

REJECTED = "manifest rejected, the last good one is in force"

_STATE_STYLE = {
    "fresh": "green",
    "building": "cyan",
    "missing": "cyan",
    "stale": "yellow",
    "uncached": "dim",
    "orphan": "dim",
}


def skipped_files_line(files: Sequence[str]) -> str:
    """One line on the files of a prompts_from folder whose names cannot be a prompt's."""
    count = "1 file is"
    if len(files) != 1:
        count = f"{len(files)} files are"

    names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return (
        f"{count} skipped: a prompt's name has only a-z 0-9 . _ - and begins with a letter or "
        f"digit: {names}"
    )


def print_status(console: Console, status: dict[str, Any], *, stays: bool = False) -> None:
    """The status as it is now.

    `stays`: it is read later, too, so it has nothing that changes by itself.
    """
    status = words.shown(status)
    prompts = urgent_first(status["prompts"])
    wide = console.width >= WIDE

    for line in (*troubles(status), *_heading(status, stays=stays)):
        console.print(line)
    if retired := retired_line(status):
        console.print(Text(retired, style="dim"))

    if not prompts:
        console.print(no_prompts(status))
        return

    console.print(prompt_table(prompts, console.width, notes=wide))
    for who, note in (
        () if wide else notes_of(prompts, Counter(map(words.note_of, prompts)), words.note_of)
    ):
        console.print(Text(f"{who}: {note}", style="dim"))


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
    prompts: Sequence[dict[str, Any]], width: int, *, notes: bool, overflow: OverflowMethod = "fold"
) -> Table:
    """Name and state, and the figures for which `width` has room beside them."""
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

    for prompt, row in zip(prompts, rows, strict=True):
        cells = [
            Text(row["prompt"], overflow=overflow, no_wrap=one_line),
            Text(row["state"], style=_STATE_STYLE.get(row["state"], "red")),
        ]
        cells += [Text(row[name]) for name in figures]
        if notes:
            cells.append(Text(words.note_of(prompt), overflow=overflow, no_wrap=one_line))
        table.add_row(*cells)

    return table


def _row(prompt: dict[str, Any]) -> dict[str, str]:
    row = dict.fromkeys(("tokens", "size", "cold", "warm"), "")
    row["prompt"] = name_of(prompt)
    row["state"] = prompt["state"]
    row["hits"] = words.hits_of(prompt)

    if artifact := prompt.get("artifact"):
        row["tokens"] = str(artifact["tokens"])
        row["size"] = words.size(artifact["size_bytes"])
        if artifact["verified"] != "off":
            row["cold"] = f"{artifact['cold_ttft_ms']:.0f} ms"
            row["warm"] = f"{artifact['warm_ttft_ms']:.0f} ms"

    return row


def _that_fit(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """The columns of figures beside names and states, as they stand in the table."""

    def wide(name: str) -> int:
        return max(len(name), *(cell_len(row[name]) for row in rows))

    left = width - min(wide("prompt"), _NAME_WIDTH) - 2 - wide("state")
    room = itertools.accumulate(2 + wide(name) for name in _FIGURES)
    fitting = [name for name, needed in zip(_FIGURES, room, strict=True) if needed <= left]
    return [name for name in ("tokens", "size", "cold", "warm", "hits") if name in fitting]


def name_of(prompt: dict[str, Any]) -> str:
    return f"{prompt['model']}/{prompt['prompt']}"


def troubles(status: dict[str, Any]) -> Iterator[Text]:
    """Troubles of the daemon as a whole; a line for each."""
    for problem in status["manifest"]["problems"]:
        yield Text(f"{REJECTED}: {problem}", style="bold red")
    if trouble := status["cache"]["trouble"]:
        yield Text(f"the store cannot be read: {trouble}", style="bold red")

    for notice in status["notices"]:
        yield Text(notice, style="yellow")

    if status["watching"] == "polling":
        yield Text(
            "polling instead of inotify: changes are noticed some seconds later; the log says why",
            style="yellow",
        )

    if files := status["manifest"].get("skipped_files"):
        yield Text(skipped_files_line(files), style="dim")


def _heading(status: dict[str, Any], *, stays: bool) -> Iterator[Text]:
    yield daemon_line(
        status,
        age=since(status["started_at"]) if stays else f"up {words.duration(status['uptime_s'])}",
    )
    yield Text(words.summary_of(status), style="bold")
    yield Text(f"engine {status['engine']}, cache {used_of(status)}, answers: {answers_of(status)}")
    yield from map(model_line, status["models"])
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


def retired_line(status: dict[str, Any]) -> str:
    """Name the prompt caches that are kept though nobody declares them; empty without any."""
    retired = status["retired"]
    count = status["cache"]["retired"]
    if not retired:
        return ""

    named = ", ".join(dict.fromkeys(name_of(artifact) for artifact in retired[:_NAMED]))
    more = ""
    if count > _NAMED:
        more = f" and {count - _NAMED} more"

    until = when(min(artifact["kept_until"] for artifact in retired))
    taken = words.size(status["cache"]["retired_bytes"])
    return (
        f"retired: {count} ({named}{more}), {taken}, "
        f"kept at least until {until} unless space is short"
    )


def daemon_line(status: dict[str, Any], *, age: str) -> Text:
    return Text(f"rkcached {status['version']}, pid {status['pid']}, {age}")


def answers_of(status: dict[str, Any]) -> str:
    return ", ".join(f"{count} {state}" for state, count in status["answers"].items()) or "none yet"


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


def model_line(model: dict[str, Any]) -> Text:
    return Text(
        f"model {model['name']}: {words.worker_of(model)}", style="red" if model["trouble"] else ""
    )


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
            yield name_of(prompt) if counts[text] == 1 else f"{counts[text]} prompts", text


def when(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def since(unix_seconds: float) -> str:
    """When it began: an hour and minute of today, or the day with them."""
    then = time.localtime(unix_seconds)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("since %H:%M" if today else "since %Y-%m-%d %H:%M", then)
