"""What the pictures and the tables of `rkcached bench` and `rkcached compare` say."""

from __future__ import annotations

import io
import itertools
from typing import Any

import matplotlib as mpl
import msgspec
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from rkcached.cli.bench import plots, table
from rkcached.cli.bench.compare import Comparison, compare
from rkcached.cli.bench.results import (
    FORMAT,
    MachineFacts,
    Measured,
    ModelFacts,
    Parameters,
    PromptResult,
    Results,
    Run,
    State,
    Versions,
)

TIMES = {State.COLD: 400.0, State.FILE: 20.0, State.MEMORY: 10.0}


def run(ttft_ms: float, **changed: Any) -> Run:
    parts = {
        "queue_ms": 0.0,
        "load_ms": 0.1,
        "prefill_ms": 0.7,
        "first_decode_ms": 0.1,
        "socket_ms": 0.1,
    }
    facts = {"prompt_tokens": 120, "cached_tokens": 100, "decode_tokens_per_s": 50.0}
    shares: dict[str, float] = {name: share * ttft_ms for name, share in parts.items()}
    return msgspec.convert({"ttft_ms": ttft_ms, **shares, **facts, **changed}, Run)


def prompt(
    name: str = "p", *, model: str = "m", length: int | None = None, runs: int = 5, **changed: Any
) -> PromptResult:
    scale = (length or 1000) / 1000
    states = {
        state: Measured(
            runs=tuple(
                run(ms * (scale if state is State.COLD else 1) + i, **changed) for i in range(runs)
            )
        )
        for state, ms in TIMES.items()
    }
    return PromptResult(
        model=model,
        prompt=name,
        tokens=length or 100,
        size_bytes=1000,
        build_ms=10.0,
        length=length,
        states={state: measured.summarised() for state, measured in states.items()},
    )


def results(
    *prompts: PromptResult, runs: int = 5, cpu: str = "a processor", **changed: Any
) -> Results:
    sweep = tuple(one.length for one in prompts if one.length)
    whole = Results(
        format=FORMAT,
        date="2026-01-01T00:00:00+00:00",
        machine=MachineFacts(
            board="",
            cpu=cpu,
            cores=4,
            memory_bytes=1 << 33,
            kernel="Linux",
            clocks={},
            clocks_fixed=True,
            load_average=0.1,
        ),
        versions=Versions(rkcached="1", daemon="1", python="3"),
        parameters=Parameters(runs=runs, answer_tokens=8, question="q", sweep=sweep),
        models={one.model: ModelFacts(engine="rkllm", runtime="1.2.2") for one in prompts},
        prompts=prompts,
    )
    return msgspec.structs.replace(whole, **changed)


def drawn(found: Results) -> tuple[Figure, Any]:
    with mpl.rc_context(plots._STYLE):
        figure = plots._figure(found)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, canvas.get_renderer()  # type: ignore[no-untyped-call]


def table_of(found: Results) -> str:
    shown = io.StringIO()
    table.print_results(Console(file=shown, width=1000), found)
    return shown.getvalue()


def comparison_of(found: Comparison) -> str:
    shown = io.StringIO()
    table.print_comparison(Console(file=shown, width=1000), found)
    return shown.getvalue()


def test_a_sweep_is_drawn_on_logarithmic_axes_in_plain_numbers() -> None:
    """Else the warm lines lie on zero.

    The gain is at each warm point, the model's runtime in the legend.
    """
    figure, _ = drawn(
        results(*(prompt(str(length), length=length) for length in (128, 1024, 8192)))
    )
    first = figure.axes[0]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert first.get_xlabel() == "prompt length (tokens)"
    labels = [label.get_text() for label in (*first.get_xticklabels(), *first.get_yticklabels())]
    assert {"1,000", "100", "10"} <= set(labels)
    assert not any("$" in label for label in labels)
    gains = [text.get_text() for text in first.texts if text.get_text()]
    assert len(gains) == 6
    assert all(gain.endswith(" %") and gain.startswith("-") for gain in gains)
    entries = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"m (rkllm 1.2.2), cold", "m (rkllm 1.2.2), warm, from file", "first decode"} <= entries


def test_where_the_time_goes_is_milliseconds_in_a_panel_for_cold_and_one_for_warm() -> None:
    """In per cent of each bar nobody sees a gain.

    On one scale nobody sees what a warm answer is made of.
    """
    figure, _ = drawn(results(prompt()))
    _, cold, warm = figure.axes
    assert ("cold" in cold.get_title(), "warm" in warm.get_title()) == (True, True)
    assert cold.get_xlim()[1] > 400
    assert 20 < warm.get_xlim()[1] < 100
    assert {text.get_text() for text in warm.texts} == {
        "file 22.0 ms  -95 %",
        "memory 12.0 ms  -97 %",
    }


@pytest.mark.parametrize(
    "count", [1, 12, pytest.param(plots.MOST_PROMPTS + 1, marks=pytest.mark.long)]
)
def test_many_prompts_make_a_higher_picture(count: int) -> None:
    """No label of a prompt meets another; legends are below the axes; nothing is cut off."""
    said = ("somebody else used the machine " * 20, "few runs")
    figure, renderer = drawn(
        results(*(prompt(f"{'long-' * 12}{i}") for i in range(count)), warnings=said)
    )
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == min(count, plots.MOST_PROMPTS)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    lowest = min(axes.get_tightbbox(renderer).y0 for axes in figure.axes)
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    assert max(box.y1 for box in legends) <= lowest
    assert not legends[0].overlaps(legends[1])
    whole = figure.bbox
    notes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    beside = [
        text.get_window_extent(renderer)
        for axes in figure.axes
        for text in axes.texts
        if text.get_text()
    ]
    for box in (*boxes, *legends, *notes, *beside):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    assert min(box.y0 for box in legends) >= min(notes, key=lambda box: box.y0).y1
    assert ("first 100 of 101" in figure.texts[-1].get_text()) == (count > plots.MOST_PROMPTS)


def test_the_small_print_has_the_warnings_in_short() -> None:
    """The title does not point to a text that is not there."""
    figure, _ = drawn(
        results(prompt(), warnings=("half of the runs are spread " + "m/p cold (20 %), " * 50,))
    )
    title, notes = (text.get_text() for text in figure.texts)
    assert "trusted" not in title
    assert notes.startswith("Not to be trusted: half of the runs")
    assert notes.endswith("...")
    assert "\n" not in notes


@pytest.mark.parametrize("found", [results(), results(prompt("$a$_^"), cpu="\x1b[31m")])
def test_anything_can_be_drawn(found: Results) -> None:
    """No prompts; names that would be formulas or commands of a terminal."""
    figure, _ = drawn(found)
    assert "\x1b" not in figure.texts[0].get_text()
    only_cold = {state: Measured(missing="no") for state in State} | {
        State.COLD: Measured(runs=(run(1.0),))
    }
    drawn(results(msgspec.structs.replace(prompt(), states=only_cold)))
    drawn(results(msgspec.structs.replace(prompt(length=128), states={})))


@pytest.mark.parametrize(
    ("runs", "column", "median"),
    [(1, "max", "1 run,"), (19, "max", "of 19 runs"), (20, "p95", "of 20 runs")],
)
def test_p95_is_called_so_from_twenty_runs_on(runs: int, column: str, median: str) -> None:
    """Of fewer it is about the maximum, and is that. One run has no median."""
    shown = table_of(results(prompt(runs=runs), runs=runs))
    head = next(line for line in shown.splitlines() if "ttft" in line).split()
    assert head[1] == column
    assert median in shown
    cold = next(line for line in shown.splitlines() if line.startswith("cold")).split()
    assert float(cold[2]) == pytest.approx(
        400 + (runs - 1) * (0.95 if column == "p95" else 1), abs=0.1
    )


def test_the_legend_says_what_own_is_and_why_more_is_cached_than_the_prompt_has() -> None:
    """It is no difference of two columns. The other is said only where it is so."""
    shown = table_of(results(prompt()))
    assert "(ttft - load - prefill) less the same of the engine" in shown
    assert "cached above" not in shown
    assert "beginning of its question" in table_of(results(prompt(cached_tokens=103)))


def test_nothing_of_a_file_commands_the_terminal() -> None:
    """Names of processor, model and prompt are printed escaped."""
    bad = results(prompt("p\x1b[2J", model="m\x07"), cpu="c\x1b]0;title\x07", warnings=("w\x1b",))
    for shown in (
        table_of(bad),
        comparison_of(compare(bad, msgspec.structs.replace(bad, warnings=()))),
    ):
        assert not set(shown) & {"\x1b", "\x07"}
    assert "p\\x1b[2J" in table_of(bad)


def test_warnings_follow_the_comparison_and_are_said_once() -> None:
    """What both results say is one line."""
    before, after = (
        results(prompt(), warnings=("both", "one")),
        results(prompt(), warnings=("both", "other")),
    )
    found = compare(before, after)
    assert found.warnings == ("A and B: both", "A: one", "B: other")
    shown = comparison_of(found)
    assert shown.index("cold, ms") < shown.index("not to be trusted")


def test_a_zero_has_no_ratio() -> None:
    """It is no multiple of anything, and the row says so."""
    found = compare(results(prompt()), results(prompt(load_ms=0.0)))
    row = next(row for row in found.rows if row.what == "loading, ms")
    assert (row.ratio, row.after, row.verdict) == (None, 0.0, "not compared: 0 in B")


def test_differences_are_words() -> None:
    """No brackets of a programming language, no True."""
    before = results(prompt(length=1024), prompt(length=2048))
    after = msgspec.structs.replace(
        before,
        parameters=Parameters(runs=5, answer_tokens=8, question="q"),
        machine=msgspec.structs.replace(before.machine, clocks_fixed=None),
    )
    found = {one.what: (one.before, one.after) for one in compare(before, after).differences}
    assert found == {
        "parameters.sweep": ("1,024, 2,048 tokens", "no sweep"),
        "machine.clocks_fixed": ("yes", "unknown"),
    }
