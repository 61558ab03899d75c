"""Words for the figures and states of a status document, for the HTML page and the command line.

Pure.
"""

from __future__ import annotations

import statistics
from typing import Any

from rkcached.errors import counted, printable
from rkcached.sources.access_keys import FIRST_OWNER

_LONG_S = 2.0
"""A worker that has been starting or busy for this long is shown with the time."""


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


def shown(status: dict[str, Any]) -> dict[str, Any]:
    """A copy of the status for a person's eyes.

    No text in it can command a terminal or turn the direction of a line. A worker that a build is
    about to start is not "stopped": the daemon announces the build first.
    """
    copy: dict[str, Any] = printable_all({**status, "prompts": []})
    copy["prompts"] = list(map(shown_prompt, status["prompts"]))

    building = copy.get("building")
    for model in copy["models"]:
        if model["worker"] == "stopped" and building and model["name"] == building["model"]:
            model["worker"] = "about to start"
    return copy


def shown_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """A copy of one prompt's status, its texts escaped. Quick, as there may be thousands."""
    copy = {
        name: printable(value) if isinstance(value, str) else value
        for name, value in prompt.items()
    }
    copy["description"] = printable(" ".join(prompt["description"].split()))
    return copy


def printable_all(data: Any) -> Any:
    """JSON data, its texts as `printable` gives them."""
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, dict):
        return {key: printable_all(value) for key, value in data.items()}
    return [printable_all(value) for value in data] if isinstance(data, list) else data


def summary_of(status: dict[str, Any]) -> str:
    """The daemon's one line, without the troubles of manifest and store, which are shown apart."""
    summary: str = status["summary"]
    for problem in status["manifest"]["problems"][:1]:
        summary = summary.removesuffix(f", manifest rejected: {problem}")
    return summary.removesuffix(f", store not readable: {status['cache']['trouble']}")


def no_prompts(status: dict[str, Any]) -> str:
    """The line that replaces an empty list of prompts."""
    if status["ready"]:
        return "no prompts are declared"
    return "models and prompts are shown when every file has been read"


def medians_of(status: dict[str, Any]) -> str:
    """Medians of the last times to first token, with and without a cache; empty without answers."""
    kinds = {"cached": ("hit", "loaded"), "cold": ("cold",)}
    medians = []
    for kind, states in kinds.items():
        values = [answer["ttft_ms"] for answer in status["recent"] if answer["state"] in states]
        if values:
            medians.append(f"{kind} {statistics.median(values):.0f} ms")
    return f"medians: {', '.join(medians)}" if medians else ""


def suggestion_of(suggestion: dict[str, Any]) -> str:
    """The length of a beginning, how many requests had it, and what that cost."""
    what = size(suggestion["size_bytes"])
    if suggestion["tokens"]:
        what = f"{suggestion['tokens']:,} tokens"

    requests, prefilled = suggestion["requests"], suggestion["prefilled"]
    whose = "uid" if suggestion["uid"] < FIRST_OWNER else "the key with the owner"
    text = f"{what} began {requests:,} requests of {whose} {suggestion['uid']}"
    of_them = "all" if prefilled >= requests else f"{prefilled:,}"

    seconds = suggestion["prefill_ms"] / 1000
    each = f"{seconds:.1f} s"
    if seconds < 1:
        each = f"{suggestion['prefill_ms']:.0f} ms"
    return f"{text} and were prefilled in {of_them} of them, {each} each time"


def worker_of(model: dict[str, Any]) -> str:
    """A worker's state, since when if that is long, how many requests wait, and what is wrong."""
    text: str = model["worker"]
    if model["worker"] in ("busy", "starting") and model["state_s"] >= _LONG_S:
        text += f" for {duration(model['state_s'])}"
    if model["waiting"]:
        text += f", {model['waiting']} waiting"
    if model.get("preload") is not None:
        text += ", " + " ".join(("preload", *model["preload"]))
    if model["restarts"]:
        text += f", {model['restarts']} restarts"
    if note := model["trouble"] or model.get("preload_trouble") or model["last_failure"]:
        text += f" ({note})"
    return text


def hits_of(prompt: dict[str, Any]) -> str:
    """How often its cache helped; "-" if it was never loaded."""
    if not prompt["last_used"]:
        return "-"
    hits, misses = prompt["hits"], prompt["misses"]
    return f"{hits} of {hits + misses}" if misses else str(hits)


def reason_of(prompt: dict[str, Any]) -> str:
    """The reason for its state and the hint; empty for a missing cache that is only to be built."""
    reason = prompt["reason"] if prompt["reason"] != "missing" else ""
    return "; ".join(filter(None, (reason, prompt["hint"])))


def note_of(prompt: dict[str, Any]) -> str:
    """A build's progress; the reason for the state; where there is none, what the prompt is."""
    progress = prompt.get("progress")
    reason = reason_of(prompt)
    if progress and progress["total_tokens"]:
        done = f"{progress['done_tokens']} of {progress['total_tokens']} tokens"
        return f"{done}, {reason}" if reason else done
    if reason:
        return reason

    parts = [prompt["description"]]
    if tools := prompt.get("tools"):
        parts.append(counted(len(tools), "tool"))
    return ", ".join(filter(None, parts))
