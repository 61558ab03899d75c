"""Figures with their aims, the statistics they are made with, and the machine they hold for.

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
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from rkcached import __version__
from rkcached.cli.bench.machine import QUIET_LOAD
from rkcached.cli.bench.machine import machine as measured_machine
from rkcached.cli.bench.samples import median, number, p95, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A cell of a table. `samples` are in the unit of `value`, in the order they were taken."""

    part: str
    table: str = ""
    """Of a part that has several."""
    name: str
    column: str = ""
    """Of a table that compares; empty in one that has a figure in each row."""
    value: float
    unit: str
    aim: float | None = None
    at_least: bool = False
    """The value must be the aim or more; else the aim or less."""
    note: str = ""
    samples: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    @property
    def words(self) -> str:
        """The value with its unit; a number without one is explained by its note."""
        if self.unit:
            return f"{number(self.value)} {self.unit}"
        return ": ".join(filter(None, (f"{self.value:,.0f}", self.note)))


def of_median(
    part: str, name: str, samples: Sequence[float], unit: str, *, note: str = "", **others: Any
) -> Figure:
    """The median of `samples`, with p95 and their number in the note."""
    statistics = f"p95 {number(p95(samples))}, n={len(samples)}"
    return Figure(
        part=part,
        name=name,
        value=median(samples),
        unit=unit,
        note="; ".join(filter(None, (statistics, note))),
        samples=tuple(samples),
        **others,
    )


def difference(
    part: str, name: str, left: Sequence[float], right: Sequence[float], **others: Any
) -> Figure:
    """The median of the differences of pairs in milliseconds, with their spread in the note."""
    samples = tuple(a - b for a, b in zip(left, right, strict=True))
    return Figure(
        part=part,
        name=name,
        value=median(samples),
        unit="ms",
        note=spread(samples),
        samples=samples,
        **others,
    )


def machine() -> dict[str, Any]:
    """Facts that the figures depend on and the code does not have.

    Taken before anything is started.
    """
    return {
        **msgspec.structs.asdict(measured_machine()),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "rkcached": __version__,
        "commit": _commit(),
        "xllamacpp": importlib.metadata.version("xllamacpp"),
    }


def is_quiet(facts: dict[str, Any]) -> bool:
    """Whether the machine had nothing else to do at the start."""
    return bool(facts["load_average"] <= QUIET_LOAD)


def document(facts: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """The document that --json writes."""
    rows = [asdict(figure) | {"met": figure.met} for figure in figures]
    return {"machine": facts | {"load_average_at_end": os.getloadavg()}, "figures": rows}


def print_tables(console: Console, facts: dict[str, Any], figures: Sequence[Figure]) -> None:
    """As Markdown, which docs/ take as they are."""
    console.print(
        f"*{facts['cores']} cores of {facts['cpu']}, {facts['kernel']}, Python {facts['python']}, "
        f"xllamacpp {facts['xllamacpp']}, load average {facts['load_average']:.1f} at the start; "
        f"rkcached {facts['rkcached']}, commit {facts['commit']}, {facts['date'][:10]}.*"
    )
    for (part, name), group in groupby(figures, lambda figure: (figure.part, figure.table)):
        console.print(f"\n### {': '.join(filter(None, (part, name)))}\n")
        console.print(_table(list(group)))
    if not is_quiet(facts):
        console.print(
            f"The load average was above {QUIET_LOAD} at the start: do not trust these figures.",
            style="red",
        )


def _table(figures: Sequence[Figure]) -> Table:
    columns = list(dict.fromkeys(figure.column for figure in figures))
    compares = columns != [""]
    table = Table("", box=box.MARKDOWN)
    for column in columns:
        table.add_column(column or "measured", justify="right")
    table.add_column("aim", justify="right")
    if not compares:
        table.add_column("note")

    rows: dict[str, dict[str, Figure]] = {}
    for number_of_row, figure in enumerate(figures):
        # Rows that compare are named once; others may have the same name, as "  reduction".
        row = figure.name if compares else f"{number_of_row} {figure.name}"
        rows.setdefault(row, {})[figure.column] = figure
    for row in rows.values():
        cells = [row[column].words if column in row else "" for column in columns]
        aims = [_aim(figure) for figure in row.values() if figure.aim is not None]
        first = next(iter(row.values()))
        notes = [] if compares else [first.note]
        table.add_row(first.name, *cells, "".join(aims), *notes)
    return table


def _aim(figure: Figure) -> str:
    bound = "at least " if figure.at_least else ""
    met = "met" if figure.met else "[bold red]missed[/]"
    return f"{bound}{figure.aim:,g} {figure.unit}, {met}"


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
