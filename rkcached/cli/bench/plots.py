"""`rkcached bench --plot`: time to first token, and where it goes.

The drawing library is an extra, read here only.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkcached.cli.bench import results as kept
from rkcached.cli.bench.results import PromptResult, Results, State
from rkcached.cli.bench.samples import median, number, p95
from rkcached.cli.bench.table import machine_line, runs_words
from rkcached.errors import ExtraMissing, UsageError, printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
MOST_PROMPTS = 100
"""A picture of more is higher than programs show, and nobody reads it."""

_STATES = {
    State.COLD: ("cold", "#b5482f"),
    State.FILE: ("warm, from file", "#2f6f9f"),
    State.MEMORY: ("warm, in memory", "#4c9a5f"),
}
_WARM = (State.FILE, State.MEMORY)
_PARTS = {
    "queue_ms": ("queue", "#bdbdbd"),
    "load_ms": ("load", "#d9a441"),
    "prefill_ms": ("prefill", "#8474a1"),
    "first_decode_ms": ("first decode", "#c46a9a"),
    "socket_ms": ("socket", "#5c5c5c"),
}
# Of models: there is a colour for each state.
_MARKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))

_WIDTH, _LINE = 13.0, 0.17
"""Inches: of the figure, of a line of small text."""
# In a line of small text.
_LETTERS = 190
# Letters of a name; a longer one loses its middle.
_NAME = 44


# Text stays text, names are no formulas, and the same results make the same file.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rkcached",
    "font.size": 9,
    "text.parse_math": False,
}


def check(file: Path) -> None:
    """Before anything is measured. Errors: UsageError; ExtraMissing without the library."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{file} is neither SVG nor PNG", hint="end its name in .svg or .png")

    try:
        usable = importlib.util.find_spec("matplotlib") is not None
        if usable:
            import matplotlib.figure  # noqa: F401, PLC0415 - an extra
    except (ImportError, OSError):  # it is there, but not what it needs
        usable = False

    if not usable:
        raise ExtraMissing(
            "--plot needs matplotlib",
            hint=f"{sys.executable} -m pip install matplotlib; or keep the results with -o "
            "FILE.json, and draw them "
            "where it is: rkcached bench --from FILE.json --plot OUT.svg",
        )


def plot(results: Results, file: Path) -> None:
    """Draw `results` into `file`, which on any error stays as it was. Errors: StoreError."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    metadata = None
    if file.suffix.lower() == ".svg":
        metadata = {"Date": None}

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font does not have
        figure = _figure(results)
        kept.put(file, lambda place: figure.savefig(place, dpi=150, metadata=metadata))


def _figure(results: Results) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    prompts = results.prompts[:MOST_PROMPTS]
    sweep = bool(results.parameters.sweep)
    head = _wrapped(_title(results))
    notes = _wrapped(_notes(results))
    models = list(dict.fromkeys(prompt.model for prompt in prompts))
    rows = 1
    if sweep:
        rows = len(models)

    top = (len(head) + 1) * _LINE
    small = 0.15
    if notes:
        small = 0.14 * len(notes) + 0.35

    bottom = small + (rows + 2) * _LINE
    least, row_height = (4.2, 0.45) if sweep else (2.0, 0.55)
    height = top + bottom + max(least, 0.9 + row_height * len(prompts))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, bottom / height, 1, 1 - (top + bottom) / height), wspace=0.03)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.3, 1, 1))
    first = figure.add_subplot(grid[0])
    cold = figure.add_subplot(grid[1], sharey=None if sweep else first)
    warm = figure.add_subplot(grid[2], sharey=cold)
    shown = _lines(first, results, prompts, models) if sweep else _bars(first, prompts)
    _stack(cold, prompts, (State.COLD,), "Where a cold answer's time goes\n(a scale of its own)")
    parts = _stack(warm, prompts, _WARM, "Where a warm answer's time goes\n(a scale of its own)")
    _rows(cold if sweep else first, prompts)

    for axes in (warm,) if sweep else (cold, warm):
        axes.tick_params(labelleft=False)

    figure.text(0.5, 1 - _LINE / 2 / height, "\n".join(head), ha="center", va="top", fontsize=8)
    for legend, columns, at in (
        (shown, len(_STATES), small + 1.5 * _LINE),
        (parts, len(_PARTS), small),
    ):
        figure.legend(
            list(legend.values()),
            list(legend),
            loc="lower center",
            bbox_to_anchor=(0.5, at / height),
            ncols=columns,
            fontsize=8,
            frameon=False,
            borderpad=0,
            labelspacing=0.2,
        )

    figure.text(
        0.01, 0.1 / height, "\n".join(notes), ha="left", va="bottom", fontsize=7, color="#555555"
    )
    return figure


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(printable(line), _LETTERS)]


def _title(results: Results) -> list[str]:
    models = ", ".join(_model(results, name) for name in results.models)
    return [
        f"{models}; {runs_words(results.parameters.runs)}",
        f"{machine_line(results.machine)}, {results.date}",
    ]


def _model(results: Results, name: str) -> str:
    facts = results.models.get(name)
    if not facts:
        return printable(name)
    return printable(f"{name} ({facts.engine} {facts.runtime or 'of an unknown version'})")


def _notes(results: Results) -> list[str]:
    """Small print, a line each."""
    notes = [
        textwrap.shorten(f"Not to be trusted: {warning}", _LETTERS, placeholder=" ...")
        for warning in results.warnings
    ]
    if len(results.prompts) > MOST_PROMPTS:
        notes.append(f"These are the first {MOST_PROMPTS} of {len(results.prompts):,} prompts.")
    return notes


def _lines(
    axes: Axes, results: Results, prompts: Sequence[PromptResult], models: list[str]
) -> dict[str, Artist]:
    """Against prompt length, a line for each model and state, with the runs' range.

    The gain is at each warm point.
    """
    from matplotlib.lines import Line2D  # noqa: PLC0415 - an extra

    shown: dict[str, Artist] = {}
    for state, (label, colour) in _STATES.items():
        for model, (marker, style) in zip(models, _MARKS * len(models), strict=False):
            points = _points(prompts, model, state)
            if not points:
                continue

            xs = []
            ys = []
            low = []
            high = []
            for x, samples, _ in points:
                y = median(samples)
                xs.append(x)
                ys.append(y)
                low.append(y - min(samples))
                high.append(max(0.0, p95(samples) - y))

            line: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": style}
            axes.errorbar(xs, ys, yerr=[low, high], markersize=4, capsize=3, **line)
            shown[f"{_model(results, model)}, {label}"] = Line2D([], [], markersize=4, **line)

            for x, y, (_, _, prompt) in zip(xs, ys, points, strict=True):
                _note_gain(axes, prompt, state, (x, y))

    axes.set(
        xlabel="prompt length (tokens)",
        ylabel="time to first token (ms)",
        title="Time to first token",
    )
    axes.set(xscale="log", yscale="log")
    axes.margins(0.08, 0.15)

    for axis, (low_end, high_end) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        _plain(axis, high_end / low_end)

    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return shown


def _points(
    prompts: Sequence[PromptResult], model: str, state: State
) -> list[tuple[int, list[float], PromptResult]]:
    """Length, samples and prompt of each point of a line, by length."""
    points = []
    for prompt in prompts:
        samples = _ttft(prompt, state)
        if prompt.model == model and samples:
            tokens = prompt.tokens or prompt.states[state].runs[0].prompt_tokens
            points.append((tokens, samples, prompt))

    return sorted(points, key=lambda point: point[0])


def _note_gain(axes: Axes, prompt: PromptResult, state: State, point: tuple[float, float]) -> None:
    """Write the gain above the warm runs' range at the slower state, below it at the other."""
    x, y = point
    medians = [_median(prompt, warm) or 0.0 for warm in _WARM]
    ranges = list(filter(None, [_ttft(prompt, warm) for warm in _WARM])) or [[y]]
    if y >= max(medians):
        place = (x, max(map(p95, ranges)))
        offset = 3
        edge = "bottom"
    else:
        place = (x, min(map(min, ranges)))
        offset = -3
        edge = "top"

    axes.annotate(
        _gain(prompt, state),
        place,
        xytext=(0, offset),
        textcoords="offset points",
        ha="center",
        va=edge,
        fontsize=7,
        color=_STATES[state][1],
    )


def _plain(axis: Any, ratio: float) -> None:
    """100, 1,000, 10,000 instead of powers of ten, and others between them where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: PLC0415 - an extra

    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 1000 else (1.0,), numticks=20)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )


def _bars(axes: Axes, prompts: Sequence[PromptResult]) -> dict[str, Artist]:
    """Three bars for each prompt, each with its figure and what it saves."""
    height = 0.8 / len(_STATES)
    most = 0.0
    for row, (state, (_, colour)) in enumerate(_STATES.items()):
        places = []
        widths = []
        labels = []
        for at, prompt in enumerate(prompts):
            if middle := _median(prompt, state):
                places.append(at + (row - 1) * height)
                widths.append(middle)
                labels.append(f"{number(middle)} ms  {_gain(prompt, state)}".rstrip())

        axes.barh(places, widths, height, color=colour)
        most = max([most, *widths])
        for width, place, label in zip(widths, places, labels, strict=True):
            _beside(axes, width, place, label)

    axes.set(xlabel="time to first token (ms)", title="Time to first token")
    axes.set_xlim(0, most * 1.3 or 1.0)
    return _patches(_STATES.values())


def _stack(
    axes: Axes, prompts: Sequence[PromptResult], states: Sequence[State], title: str
) -> dict[str, Artist]:
    """Bars of milliseconds, in their parts.

    Cold and warm answers have a panel each: one would hide the other.
    """
    height = 0.8 / len(states) * (0.7 if len(states) == 1 else 1)
    bars = []
    for at, prompt in enumerate(prompts):
        for row, state in enumerate(states):
            if _median(prompt, state) is not None:
                place = at + (row - (len(states) - 1) / 2) * height
                bars.append((place, state, prompt))

    places = [place for place, _, _ in bars]
    ends = [0.0] * len(bars)

    for figure, (_, colour) in _PARTS.items():
        widths = [max(0.0, prompt.states[state].median(figure) or 0.0) for _, state, prompt in bars]
        axes.barh(places, widths, height * 0.92, left=ends, color=colour)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]

    for place, end, (_, state, prompt) in zip(places, ends, bars, strict=True):
        where = {State.COLD: "", State.FILE: "file", State.MEMORY: "memory"}[state]
        _beside(
            axes,
            end,
            place,
            f"{where} {number(_median(prompt, state) or end)} ms  {_gain(prompt, state)}".strip(),
        )

    if not bars:
        axes.text(
            0.5,
            0.5,
            "there is none",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="#555555",
        )

    axes.set(xlabel="median of each part (ms)", title=title)
    axes.set_xlim(0, max(ends, default=0.0) * (1.3 if len(states) == 1 else 1.9) or 1.0)
    return _patches(_PARTS.values())


def _patches(entries: Iterable[tuple[str, str]]) -> dict[str, Artist]:
    from matplotlib.patches import Patch  # noqa: PLC0415 - an extra

    return {label: Patch(color=colour) for label, colour in entries}


def _beside(axes: Axes, end: float, place: float, text: str) -> None:
    axes.annotate(
        text,
        (end, place),
        xytext=(3, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=7,
        color="#333333",
    )


def _rows(axes: Axes, prompts: Sequence[PromptResult]) -> None:
    """A row for each prompt, the first one on top."""
    alone = len({prompt.model for prompt in prompts}) == 1
    names = []
    for prompt in prompts:
        name = prompt.name
        if alone:
            name = prompt.prompt if prompt.length is None else f"{prompt.length:,} tokens"
        names.append(_shortened(printable(name)))

    axes.set_yticks(range(len(prompts)), names)
    axes.set_ylim(max(1, len(prompts)) - 0.5, -0.5)


def _shortened(name: str) -> str:
    if len(name) <= _NAME:
        return name
    return f"{name[: _NAME // 2]}...{name[-_NAME // 2 + 3 :]}"


def _ttft(prompt: PromptResult, state: State) -> list[float]:
    """Of a logarithmic axis, which has no 0."""
    known = prompt.states.get(state)
    if known is not None:
        return [sample for sample in known.samples("ttft_ms") if sample > 0]
    return []


def _median(prompt: PromptResult, state: State) -> float | None:
    if state in prompt.states:
        return prompt.states[state].median("ttft_ms")
    return None


def _gain(prompt: PromptResult, state: State) -> str:
    """The share of the cold time to first token that a warm answer saves: "-95 %".

    Empty for the cold one.
    """
    cold = _median(prompt, State.COLD)
    warm = _median(prompt, state)
    if cold and warm and state is not State.COLD:
        return f"{(warm / cold - 1) * 100:+.0f} %"
    return ""
