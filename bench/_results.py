"""Figures with their targets, the statistics they are made with, and the machine they hold for.

A figure keeps its raw samples; what is printed is computed from them here and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rkcached import __version__
from rkcached.cli.bench.machine import QUIET_LOAD
from rkcached.cli.bench.machine import machine as measured_machine
from rkcached.cli.bench.samples import median, number, p95, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    limit: float
    at_least: bool = False
    """The value must be this or more; else this or less."""

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. `samples` are in the unit of `value`, in the order they were taken."""

    part: str
    name: str
    value: float
    unit: str
    target: Target | None = None
    note: str = ""
    samples: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met_by(self.value)


def of_median(
    part: str,
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    target: Target | None = None,
    note: str = "",
) -> Figure:
    """The median of `samples`, with p95 and their number in the note."""
    note_of = f"p95 {number(p95(samples))}, n={len(samples)}" + (f"; {note}" if note else "")
    return Figure(
        part=part,
        name=name,
        value=median(samples),
        unit=unit,
        target=target,
        note=note_of,
        samples=tuple(samples),
    )


def difference(part: str, name: str, samples: Sequence[float], target: Target | None) -> Figure:
    """The median of differences in milliseconds, with their spread in the note."""
    return Figure(
        part=part,
        name=name,
        value=median(samples),
        unit="ms",
        target=target,
        note=spread(samples),
        samples=tuple(samples),
    )


def machine() -> dict[str, Any]:
    """Facts that the figures depend on and the code does not have.

    Taken before anything is started.
    """
    load = os.getloadavg()
    facts = measured_machine()
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": facts.cpu,
        "cores": facts.cores,
        "memory_bytes": facts.memory_bytes,
        "kernel": facts.kernel,
        "load_average_at_start": load,
        "quiet_at_start": load[0] <= QUIET_LOAD,
        "python": platform.python_version(),
        "rkcached": __version__,
        "commit": _commit(),
        "xllamacpp": _version("xllamacpp"),
    }


def document(facts: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """The document that --json writes."""
    rows = [asdict(figure) | {"met": figure.met} for figure in figures]
    return {"machine": facts | {"load_average_at_end": os.getloadavg()}, "figures": rows}


def print_table(console: Console, facts: dict[str, Any], figures: Sequence[Figure]) -> None:
    load = " ".join(f"{value:.2f}" for value in facts["load_average_at_start"])
    console.print(
        f"{facts['date']}  {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['memory_bytes'] / 1e9:.1f} GB, "
        f"{facts['kernel']}, load {load}"
    )
    console.print(
        f"python {facts['python']}, rkcached {facts['rkcached']} ({facts['commit']}), xllamacpp "
        f"{facts['xllamacpp']}"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("part", "figure", "value", "target", "met", "note"):
        table.add_column(
            name, justify="right" if name in ("value", "target") else "left", no_wrap=name != "note"
        )
    previous = ""
    for figure in figures:
        if previous and figure.part != previous:
            table.add_section()
        target = figure.target
        table.add_row(
            figure.part if figure.part != previous else "",
            figure.name,
            f"{number(figure.value)} {figure.unit}",
            f"{'>=' if target.at_least else '<='} {target.limit:g} {figure.unit}" if target else "",
            {True: "yes", False: "[bold red]NO[/]", None: ""}[figure.met],
            figure.note,
        )
        previous = figure.part
    console.print(table)
    if not facts["quiet_at_start"]:
        console.print(
            f"The load average was above {QUIET_LOAD} at the start: do not trust these figures.",
            style="red",
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "no git"
    return run.stdout.strip() or "no commit"
