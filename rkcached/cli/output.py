"""Writes for commands: consoles, a progress line, JSON. Imports rich only where it is used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from rkcached.errors import Problem, RkcachedError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from rkcached.cli import forms


def console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that marks nothing by itself.

    Where no terminal shows the lines, they have no blanks at their ends, and it keeps them whole,
    unless COLUMNS is set.
    """
    from rich.console import Console

    class Plain(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            with self.capture() as captured:
                super().print(*objects, **options)
            lines = captured.get().split("\n")
            text = "\n".join(line.rstrip(" ") for line in lines)
            super().print(text, end="", markup=False, emoji=False, soft_wrap=True)

    made = Console(highlight=False, quiet=quiet, stderr=stderr)
    if made.is_terminal:
        return made

    plain = Plain(highlight=False, quiet=quiet, stderr=stderr)
    if not os.environ.get("COLUMNS"):
        plain.width = 100_000
    return plain


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """A line on standard error that can be replaced; nothing where that is no terminal."""
    from rich.text import Text

    errors = console(stderr=True)
    if not errors.is_terminal:
        yield lambda _: None
        return

    with errors.status("") as line:
        yield lambda text: line.update(Text(printable(text)))


def json_text(data: Any, *, indent: int | None = None) -> str:
    """JSON with letters as they are, but escapes for those that a terminal would obey."""
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1]
        for letter in text
    )


def print_json(data: Mapping[str, object]) -> None:
    """Print a document: one of the forms in `forms`, or what the daemon sent."""
    click.echo(json_text(data, indent=2))


def problems_data(problems: Iterable[Problem]) -> list[forms.Problem]:
    return [
        {
            "file": problem.file,
            "line": problem.line,
            "message": problem.message,
            "hint": problem.hint,
        }
        for problem in problems
    ]


def complaints_data(errors: Iterable[RkcachedError]) -> list[forms.Complaint]:
    return [{"message": error.message, "hint": error.hint} for error in errors]
