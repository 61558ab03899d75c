"""Draws what was measured: `scale.svg`, how the daemon's own work grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from _figures import Figure
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator

_PANELS = {
    "start to the first plan": "start to the first plan (s)",
    "restart to all seen fresh": "restart to all seen fresh (s)",
    "nothing to do: SIGHUP to rest": "a look with nothing to do (ms)",
    "edit to its build started": "edit to its build started (ms)",
    "edit to published": "edit to published (ms)",
    "resident memory": "resident memory (MB)",
}
_COLOURS = ("#2f6f9f", "#d9a441", "#b5482f")


def draw_scale(figures: Sequence[Figure], facts: dict[str, Any], file: Path) -> None:
    """Each figure against the number of prompts, on logarithmic axes.

    The aim at the largest as a mark.
    """
    panels: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        if figure.part == "scale":
            panels[figure.name].append(figure)
    if not panels:
        return

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rkcached", "font.size": 9}):
        drawing = Drawing(figsize=(10, 5.6), layout="constrained")
        for axes, (name, title) in zip(drawing.subplots(2, 3).flat, _PANELS.items(), strict=True):
            _draw(axes, panels[name])
            axes.set(xscale="log", yscale="log", title=title, xlabel="prompts")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:,g}")
        max(drawing.axes, key=lambda axes: len(axes.lines)).legend()
        drawing.suptitle(
            f"memory engine, prompts of 2 KB; {facts['cpu']}, {facts['cores']} cores, "
            f"{facts['date'][:10]}",
            fontsize=8,
        )
        drawing.savefig(file, metadata={"Date": None})


def _draw(axes: Any, figures: Sequence[Figure]) -> None:
    """A line for each number of models, one for linear growth, and the aim."""
    lines: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        lines[figure.table].append(figure)
    for (label, points), colour in zip(lines.items(), _COLOURS, strict=False):
        sizes = [_prompts(point) for point in points]
        values = [point.value for point in points]
        axes.plot(sizes, values, marker="o", color=colour, label=label)

    for largest in sorted(figures, key=lambda point: (_prompts(point), point.value))[-1:]:
        last = _prompts(largest)
        axes.plot(
            [last / 10, last],
            [largest.value / 10, largest.value],
            color="#9a9a9a",
            linestyle=":",
            label="linear growth",
        )
        if largest.aim is not None:
            axes.plot(
                last,
                largest.aim,
                marker="_",
                markersize=22,
                markeredgewidth=2,
                color="black",
                label="aim",
            )


def _prompts(figure: Figure) -> int:
    """Its column is "1,000 prompts"."""
    return int(figure.column.split()[0].replace(",", ""))
