"""Figures with their targets, the statistics they are made with, and the machine they hold for.

A figure keeps its raw samples; what is printed is computed from them here and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from rkcached import __version__

QUIET_LOAD = 0.5
"""Load average (1 min) above which the figures are not to be trusted."""


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
    part: str, name: str, samples: Sequence[float], unit: str, *, target: Target | None = None, note: str = ""
) -> Figure:
    """The median of `samples`, with p95 and their number in the note."""
    said = f"p95 {_number(p95(samples))}, n={len(samples)}" + (f"; {note}" if note else "")
    return Figure(
        part=part,
        name=name,
        value=statistics.median(samples),
        unit=unit,
        target=target,
        note=said,
        samples=tuple(samples),
    )


def p95(samples: Sequence[float]) -> float:
    """Interpolated between order statistics; of few samples it is nearly their maximum."""
    return statistics.quantiles(samples, n=20, method="inclusive")[-1] if len(samples) > 1 else samples[0]


def spread(samples: Sequence[float]) -> str:
    """Quartiles, and the 95 % confidence interval of the median from order statistics: no shape is assumed."""
    ordered, count = sorted(samples), len(samples)
    if count < 6:  # fewer have no such interval
        return f"from {_number(ordered[0])} to {_number(ordered[-1])}, n={count}"
    half = 1.96 * math.sqrt(count) / 2
    low, high = ordered[max(0, math.floor(count / 2 - half))], ordered[min(count - 1, math.ceil(count / 2 + half))]
    first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return f"quartiles {_number(first)} to {_number(third)}, 95 % CI {_number(low)} to {_number(high)}, n={count}"


def machine() -> dict[str, Any]:
    """What the figures depend on and the code does not say. Taken before anything is started."""
    load = os.getloadavg()
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_at_start": load,
        "quiet_at_start": load[0] <= QUIET_LOAD,
        "python": platform.python_version(),
        "rkcached": __version__,
        "commit": _commit(),
        "xllamacpp": _version("xllamacpp"),
    }


def document(facts: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """What --json writes."""
    rows = [asdict(figure) | {"met": figure.met} for figure in figures]
    return {"machine": facts | {"load_average_at_end": os.getloadavg()}, "figures": rows}


def print_table(console: Console, facts: dict[str, Any], figures: Sequence[Figure]) -> None:
    load = " ".join(f"{value:.2f}" for value in facts["load_average_at_start"])
    console.print(
        f"{facts['date']}  {facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.1f} GB, "
        f"{facts['kernel']}, load {load}"
    )
    console.print(
        f"python {facts['python']}, rkcached {facts['rkcached']} ({facts['commit']}), xllamacpp {facts['xllamacpp']}"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("part", "figure", "value", "target", "met", "note"):
        table.add_column(name, justify="right" if name in ("value", "target") else "left", no_wrap=name != "note")
    previous = ""
    for figure in figures:
        if previous and figure.part != previous:
            table.add_section()
        target = figure.target
        table.add_row(
            figure.part if figure.part != previous else "",
            figure.name,
            f"{_number(figure.value)} {figure.unit}",
            f"{'>=' if target.at_least else '<='} {target.limit:g} {figure.unit}" if target else "",
            {True: "yes", False: "[bold red]NO[/]", None: ""}[figure.met],
            figure.note,
        )
        previous = figure.part
    console.print(table)
    if not facts["quiet_at_start"]:
        console.print(f"The load average was above {QUIET_LOAD} at the start: do not trust these figures.", style="red")


def _number(value: float) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:z,.{digits}f}"


def _cpu_model() -> str:
    """The name from /proc/cpuinfo; ARM kernels give none there, but the device tree names the board."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    board = Path("/proc/device-tree/model")
    return board.read_text().strip("\0\n") if board.exists() else platform.machine()


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
