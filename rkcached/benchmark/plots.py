"""`rkcached bench --plot`: time to first token, and where it goes. The drawing library is an extra, read here only."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rkcached.benchmark.results import Measured, PromptResult, Results, State
from rkcached.benchmark.samples import p95
from rkcached.benchmark.table import machine_line
from rkcached.errors import StoreError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")

_STATES = {
    State.COLD: ("cold", "#b5482f"),
    State.FILE: ("warm, from file", "#2f6f9f"),
    State.MEMORY: ("warm, in memory", "#4c9a5f"),
}
_PARTS = {
    "queue_ms": ("queue", "#9a9a9a"),
    "load_ms": ("load", "#2f6f9f"),
    "prefill_ms": ("prefill", "#b5482f"),
    "first_decode_ms": ("first decode", "#d9a441"),
    "socket_ms": ("socket", "#6b5b95"),
}


def check(file: Path) -> None:
    """Before anything is measured. Errors: UsageError."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{file} is neither SVG nor PNG", hint="end its name in .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", hint="pip install 'rkcached[plot]', or pip install matplotlib")


def plot(results: Results, file: Path) -> None:
    """Draw `results` into `file`. Errors: StoreError."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Text stays text, and the same results make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rkcached", "font.size": 9}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        if results.parameters.sweep:
            _lines(left, results.prompts)
        else:
            _bars(left, results.prompts)
        _stack(right, results.prompts)
        figure.suptitle(_title(results), fontsize=8)
        try:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise StoreError(
                f"cannot write {file}: {error.strerror}", hint="name a file in a folder that you may write"
            ) from error


def _title(results: Results) -> str:
    models = ", ".join(f"{name} ({model.engine} {model.runtime or '?'})" for name, model in results.models.items())
    doubt = "; not to be trusted, see the text" if results.warnings else ""
    return f"{models}, median of {results.parameters.runs} runs{doubt}\n{machine_line(results.machine)}, {results.date}"


def _lines(axes: Axes, prompts: tuple[PromptResult, ...]) -> None:
    """Against prompt length, a line for each model and state, with the runs' range."""
    for model in dict.fromkeys(prompt.model for prompt in prompts):
        for state, (label, colour) in _STATES.items():
            found = [(p, p.states[state].samples("ttft_ms")) for p in prompts if p.model == model]
            points = [(p.tokens or p.states[state].runs[0].prompt_tokens, samples) for p, samples in found if samples]
            if points:
                xs, ys = [x for x, _ in points], [statistics.median(samples) for _, samples in points]
                low = [y - min(samples) for y, (_, samples) in zip(ys, points, strict=True)]
                high = [max(0.0, p95(samples) - y) for y, (_, samples) in zip(ys, points, strict=True)]
                axes.errorbar(xs, ys, yerr=[low, high], label=f"{model}, {label}", color=colour, marker="o", capsize=3)
    axes.set(xlabel="prompt length (tokens)", ylabel="time to first token (ms)", title="Time to first token")
    axes.set_ylim(bottom=0)
    axes.legend()


def _bars(axes: Axes, prompts: tuple[PromptResult, ...]) -> None:
    width = 0.8 / len(_STATES)
    for number, (state, (label, colour)) in enumerate(_STATES.items()):
        heights = [prompt.states[state].median("ttft_ms") or 0.0 for prompt in prompts]
        axes.bar([at + number * width for at in range(len(prompts))], heights, width, label=label, color=colour)
    axes.set_xticks(
        [at + width for at in range(len(prompts))], [prompt.name for prompt in prompts], rotation=20, ha="right"
    )
    axes.set(ylabel="time to first token (ms)", title="Time to first token")
    axes.legend()


def _stack(axes: Axes, prompts: tuple[PromptResult, ...]) -> None:
    """Where the time goes, as shares: a cold answer of a long prompt would hide all others."""
    bars: list[tuple[str, Measured]] = [
        (f"{prompt.name} {state}", prompt.states[state])
        for prompt in prompts
        for state in _STATES
        if prompt.states[state].runs
    ]
    names = [name for name, _ in bars]
    left = [0.0] * len(bars)
    for figure, (label, colour) in _PARTS.items():
        shares = [100 * max(0.0, one.median(figure) or 0.0) / _whole(one) for _, one in bars]
        axes.barh(names, shares, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="share of the time to first token (%)", title="Where the time goes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(_PARTS), fontsize=7)


def _whole(measured: Measured) -> float:
    return sum(max(0.0, measured.median(figure) or 0.0) for figure in _PARTS) or 1.0
