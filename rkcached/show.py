"""Tables and lines that a person likes to read, from the same data that --json prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, assert_never

from rich.console import Console, OverflowMethod
from rich.table import Table
from rich.text import Text

from rkcached.plan import Action, Assessment, Blocked, Build, Remove, State

WIDE = 110
"""Columns from which the table has room for notes; on a narrower terminal they follow it."""

_LONG_S = 2.0
"""From here on it is said how long a worker has been at it."""

NO_PROMPTS = Text("no prompts are declared", style="dim")

_STATE_STYLE = {
    "fresh": "green",
    "building": "cyan",
    "missing": "cyan",
    "stale": "yellow",
    "uncached": "dim",
    "orphan": "dim",
}


def action_data(action: Action) -> dict[str, Any]:
    """An action as `rkcached plan --json` prints it."""
    data: dict[str, Any] = {"model": action.key.model, "prompt": action.key.prompt, "reason": action.reason}
    match action:
        case Build():
            return {"action": "build", **data, "fingerprint": action.fingerprint.digest}
        case Remove():
            return {"action": "remove", **data}
        case Blocked():
            return {"action": "blocked", **data, "hint": action.hint, "retry_at": action.retry_at or None}
        case _:
            assert_never(action)


def print_plan(console: Console, actions: Sequence[Action], assessments: Sequence[Assessment]) -> None:
    signs = {"build": ("+", "green"), "remove": ("-", "red"), "blocked": ("!", "yellow")}
    table = Table.grid(padding=(0, 2))
    for action in actions:
        data = action_data(action)
        sign, style = signs[data["action"]]
        reason = Text(data["reason"])
        if data.get("hint"):
            reason.append(f"\n{data['hint']}", style="dim")
        table.add_row(Text(f"{sign} {data['action']}", style=style), str(action.key), reason)
    if actions:
        console.print(table)
    counts = Counter(data["action"] for data in map(action_data, actions))
    fresh = sum(assessment.state is State.FRESH for assessment in assessments)
    words = [f"{counts[name]} to {name}" for name in ("build", "remove") if counts[name]]
    words += [f"{counts['blocked']} blocked"] if counts["blocked"] else []
    console.print(Text(", ".join([*words, f"{fresh} fresh"]) if words else f"nothing to do, {fresh} fresh"))


def print_status(console: Console, status: dict[str, Any]) -> None:
    prompts, wide = status["prompts"], console.width >= WIDE
    for line in status_heading(status):
        console.print(line)
    if not prompts:
        console.print(NO_PROMPTS)
        return
    console.print(prompt_table(prompts, notes=wide))
    for prompt in () if wide else prompts:
        if note := note_of(prompt):
            console.print(Text(f"{prompt['model']}/{prompt['prompt']}: {note}", style="dim"))


def prompt_table(prompts: Sequence[dict[str, Any]], *, notes: bool, overflow: OverflowMethod = "fold") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("prompt")  # on a narrow terminal names give way, figures do not
    table.add_column("state", no_wrap=True)
    for name in ("tokens", "size", "cold", "warm", "hits"):
        table.add_column(name, justify="right", no_wrap=True)
    if notes:
        table.add_column("note", overflow=overflow, no_wrap=overflow != "fold", style="dim")
    for prompt in prompts:
        artifact = prompt.get("artifact") or {}
        measured = artifact and artifact["verified"] != "off"
        table.add_row(
            Text(f"{prompt['model']}/{prompt['prompt']}", overflow=overflow, no_wrap=overflow != "fold"),
            Text(prompt["state"], style=_STATE_STYLE.get(prompt["state"], "red")),
            str(artifact.get("tokens", "")),
            size(artifact["size_bytes"]) if artifact else "",
            f"{artifact['cold_ttft_ms']:.0f} ms" if measured else "",
            f"{artifact['warm_ttft_ms']:.0f} ms" if measured else "",
            hits_of(prompt),
            *([note_of(prompt)] if notes else []),
        )
    return table


def hits_of(prompt: dict[str, Any]) -> str:
    """How often its cache helped; "-" if it was never loaded."""
    hits, misses = prompt["hits"], prompt["misses"]
    if not prompt["last_used"]:
        return "-"
    return f"{hits} of {hits + misses}" if misses else str(hits)


def status_heading(status: dict[str, Any]) -> Iterator[Text]:
    for problem in status["manifest"]["problems"]:
        yield Text(f"manifest rejected, the last good one is in force: {problem}", style="bold red")
    cache = status["cache"]
    if cache["trouble"]:
        yield Text(f"the store cannot be read: {cache['trouble']}", style="bold red")
    limit = f" of {size(cache['max_bytes'])}" if cache["max_bytes"] else ""
    answers = ", ".join(f"{count} {state}" for state, count in status["answers"].items()) or "none yet"
    yield Text(f"rkcached {status['version']}, pid {status['pid']}, up {duration(status['uptime_s'])}")
    yield Text(status["summary"], style="bold")
    kinds = [(name, cache[f"{name}_bytes"]) for name in ("orphan", "foreign", "quarantine")]
    shares = ", ".join(f"{size(size_bytes)} {name}" for name, size_bytes in kinds if size_bytes)
    used = f"{size(cache['used_bytes'])}{limit}" + (f" ({shares})" if shares else "")
    yield Text(f"engine {status['engine']}, cache {used}, answers: {answers}")
    if status["watching"] == "polling":
        yield Text("polling instead of inotify: not everything can be watched, the log says why", style="yellow")
    for model in status["models"]:
        yield Text(f"model {model['name']}: {worker_of(model)}", style="red" if model["trouble"] else "")


def worker_of(model: dict[str, Any]) -> str:
    """What its worker does, since when if that is long, who waits for it, and what is wrong."""
    note = model["trouble"] or model["last_failure"]
    restarts = f", {model['restarts']} restarts" if model["restarts"] else ""
    working = model["worker"] in ("busy", "starting") and model["state_s"] >= _LONG_S
    since = f" for {duration(model['state_s'])}" if working else ""
    waiting = f", {model['waiting']} waiting" if model["waiting"] else ""
    return f"{model['worker']}{since}{waiting}{restarts}" + (f" ({note})" if note else "")


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """A letter for each value, the higher the larger; the largest fills its line."""
    steps = "_.:-=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    top = max(values, default=0.0) or 1.0
    return "".join(steps[min(int(value / top * len(steps)), len(steps) - 1)] for value in values)


def note_of(prompt: dict[str, Any]) -> str:
    progress = prompt.get("progress")
    if progress and progress["total_tokens"]:
        return f"{progress['done_tokens']} of {progress['total_tokens']} tokens, {prompt['reason']}"
    parts = [prompt["reason"], prompt["hint"]] if prompt["reason"] else [prompt["description"]]
    return "; ".join(part for part in parts if part)


def size(count: float | None) -> str:
    """Bytes in decimal units, as `ls -h --si` shows them."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m} min"
    return f"{m} min {s} s" if minutes else f"{s} s"


def when(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
