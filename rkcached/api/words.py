"""Words for the figures and states of a status document, for the HTML page and the command line.

Pure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rkcached.errors import counted, printable
from rkcached.plan import vocabulary
from rkcached.plan.vocabulary import ANSWERS
from rkcached.sources.access_keys import FIRST_OWNER

REJECTED: Final = "manifest rejected, the last good one is in force"

# So many retired prompt caches are named.
_NAMED = 3

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


def number(value: float) -> str:
    """With commas between the thousands, and no fraction."""
    return f"{value:,.0f}"


def milliseconds(value: float) -> str:
    return f"{number(value)} ms"


def when(unix_seconds: float) -> str:
    """The local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


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
    times: dict[str, list[float]] = {word.kind: [] for word in ANSWERS.values() if word.kind}
    for answer in status["recent"]:
        word = ANSWERS.get(answer["state"])
        if word is not None and word.kind:
            times[word.kind].append(answer["ttft_ms"])

    medians = [
        f"{kind} {milliseconds(statistics.median(values))}"
        for kind, values in times.items()
        if values
    ]
    return f"medians: {', '.join(medians)}" if medians else ""


def answers_of(status: dict[str, Any]) -> str:
    """How many answers were in each state."""
    counts = (f"{number(count)} {state}" for state, count in status["answers"].items())
    return ", ".join(counts) or "none yet"


def errors_of(status: dict[str, Any]) -> Iterator[str]:
    """The troubles of manifest and store."""
    for problem in status["manifest"]["problems"]:
        yield f"{REJECTED}: {problem}"
    if trouble := status["cache"]["trouble"]:
        yield f"the store cannot be read: {trouble}"


def warnings_of(status: dict[str, Any]) -> Iterator[str]:
    """The sentences on what seems wrong with the daemon as a whole and can be used all the same."""
    yield from status["notices"]
    if status["watching"] == "polling":
        yield (
            "polling instead of inotify: changes are noticed some seconds later; the log says why"
        )
    if files := status["manifest"].get("skipped_files"):
        yield skipped_files(files)


def skipped_files(files: Sequence[str]) -> str:
    """One line on the files of a prompts_from folder whose names cannot be a prompt's."""
    count = "1 file is"
    if len(files) != 1:
        count = f"{number(len(files))} files are"

    names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return (
        f"{count} skipped: a prompt's name has only a-z 0-9 . _ - and begins with a letter or "
        f"digit: {names}"
    )


def retired_of(status: dict[str, Any]) -> str:
    """Name the prompt caches that are kept though nobody declares them; empty without any."""
    retired = status["retired"]
    if not retired:
        return ""

    count = status["cache"]["retired"]
    named = ", ".join(dict.fromkeys(map(name_of, retired[:_NAMED])))
    more = ""
    if count > _NAMED:
        more = f" and {number(count - _NAMED)} more"

    until = when(min(artifact["kept_until"] for artifact in retired))
    taken = size(status["cache"]["retired_bytes"])
    return (
        f"retired: {number(count)} ({named}{more}), {taken}, "
        f"kept at least until {until} unless space is short"
    )


def name_of(prompt: dict[str, Any]) -> str:
    return f"{prompt['model']}/{prompt['prompt']}"


def state_of(prompt: dict[str, Any]) -> str:
    """The state of a prompt, and whether the daemon learned it."""
    return vocabulary.state_words(prompt["state"], learned=prompt["learned"])


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
        text += f", {counted(model['restarts'], 'restart')}"
    if note := model["trouble"] or model.get("preload_trouble") or model["last_failure"]:
        text += f" ({note})"
    return text


def usage_of(model: dict[str, Any]) -> str:
    """The memory and the CPU time of a model's worker; empty where they are not known."""
    if model.get("memory_bytes") is None:
        return ""
    return f"{size(model['memory_bytes'])} of memory, {duration(model['cpu_s'])} of CPU time"


def hits_of(prompt: dict[str, Any]) -> str:
    """How often its cache helped; "-" if it was never loaded."""
    if not prompt["last_used"]:
        return "-"
    hits, misses = prompt["hits"], prompt["misses"]
    return f"{number(hits)} of {number(hits + misses)}" if misses else number(hits)


def reason_of(prompt: dict[str, Any]) -> str:
    """The reason for its state and the hint; empty for a missing cache that is only to be built."""
    reason = prompt["reason"] if prompt["reason"] != "missing" else ""
    return "; ".join(filter(None, (reason, prompt["hint"])))


def done_of(progress: dict[str, Any]) -> str:
    """How far a build is."""
    return f"{number(progress['done_tokens'])} of {number(progress['total_tokens'])} tokens"


def note_of(prompt: dict[str, Any]) -> str:
    """A build's progress; the reason for the state; where there is none, what the prompt is."""
    progress = prompt.get("progress")
    reason = reason_of(prompt)
    if progress and progress["total_tokens"]:
        done = done_of(progress)
        return f"{done}, {reason}" if reason else done
    if reason:
        return reason

    parts = [prompt["description"]]
    if tools := prompt.get("tools"):
        parts.append(counted(len(tools), "tool"))
    return ", ".join(filter(None, parts))
