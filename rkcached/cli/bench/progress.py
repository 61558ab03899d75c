"""Shows what `rkcached bench` is doing: one line at a terminal, elsewhere one for each prompt."""

from __future__ import annotations

import contextlib
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from rkcached.cli.bench.results import State
from rkcached.errors import printable


class Shown:
    """Counts answers: those that came, and those that will not."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._prompts = self._prompt = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=_column(ratio=1)),
            TextColumn("{task.fields[doing]}", markup=False, table_column=_column()),
            BarColumn(bar_width=8),
            MofNCompleteColumn(table_column=_column()),
            TimeElapsedColumn(table_column=_column()),
            TimeRemainingColumn(table_column=_column()),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, doing="")
        self._total = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._progress.stop()

    def preparing(self, model: str, doing: str) -> None:
        self._progress.update(self._task, description=model, doing=doing)
        self._say(f"{model}: {doing}")

    def plan(self, *, prompts: int, answers: int) -> None:
        self._prompts = prompts
        self._total = answers
        self._progress.reset(self._task, total=answers)

    def prompt(self, name: str) -> None:
        self._prompt += 1
        self._progress.update(self._task, description=name, doing="first answer")
        self._say(f"measuring {name}, {self._prompt} of {self._prompts}")

    def doing(self, state: State, number: int, runs: int, *, alone: bool) -> None:
        self._progress.update(
            self._task, doing=f"{state} {number}/{runs}{', engine alone' if alone else ''}"
        )

    def done(self) -> None:
        self._progress.advance(self._task)

    def drop(self, answers: int) -> None:
        """So many will not come."""
        self._total -= answers
        self._progress.update(self._task, total=self._total)

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(Text(printable(line)), soft_wrap=True)


def _column(ratio: int | None = None) -> Column:
    return Column(ratio=ratio, no_wrap=True, overflow="ellipsis")
