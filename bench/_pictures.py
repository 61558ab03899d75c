"""Draws what was measured: `scale.svg`, how the daemon's own work grows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from _results import Figure
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator

_NAME = re.compile(r"([\d,]+) over (\d+): (.+)")
_PANELS = {
    "start to the first plan": "start to the first plan (s)",
    "restart to all seen fresh": "restart to all seen fresh (s)",
    "nothing to do: SIGHUP to rest": "a look with nothing to do (ms)",
    "edit to its build started": "edit to its build started (ms)",
    "edit to published": "edit to published (ms)",
    "resident memory": "resident memory (MB)",
}
_COLOURS = {1: "#2f6f9f", 4: "#d9a441", 16: "#b5482f"}


def draw_scale(figures: Sequence[Figure], facts: dict[str, Any], file: Path) -> None:
    """Each figure against the number of prompts, on logarithmic axes.

    The aim at the largest as a mark.
    """
    points_of: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    aims: dict[str, tuple[int, float]] = {}
    for figure in figures:
        if (
            figure.part == "scale"
            and (match := _NAME.fullmatch(figure.name))
            and match[3] in _PANELS
        ):
            prompts = int(match[1].replace(",", ""))
            points_of[match[3]][int(match[2])].append((prompts, figure.value))
            if figure.target is not None:
                aims[match[3]] = (prompts, figure.target.limit)
    if not points_of:
        return
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rkcached", "font.size": 9}):
        drawing = Drawing(figsize=(10, 5.6), layout="constrained")
        for axes, (name, title) in zip(drawing.subplots(2, 3).flat, _PANELS.items(), strict=True):
            for models, points in sorted(points_of[name].items()):
                label = f"{models} model{'s' * (models > 1)}"
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    marker="o",
                    color=_COLOURS[models],
                    label=label,
                )
            last, value = max(
                (point for points in points_of[name].values() for point in points),
                default=(10, 1.0),
            )
            axes.plot(
                [last / 10, last],
                [value / 10, value],
                color="#9a9a9a",
                linestyle=":",
                label="linear growth",
            )
            if name in aims:
                axes.plot(
                    *aims[name],
                    marker="_",
                    markersize=22,
                    markeredgewidth=2,
                    color="black",
                    label="aim",
                )
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
