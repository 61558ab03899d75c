"""`rkcached bench` and `rkcached compare`: measure or read, draw, keep, print."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console

from rkcached.cli import output
from rkcached.cli.bench import compare as comparing
from rkcached.cli.bench import plots, results, runner, table
from rkcached.errors import UsageError
from rkcached.host.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files that the command line names; None where it names none."""

    kept: Path | None
    """A result to show instead of measuring."""
    output: Path | None
    plot: Path | None


def bench(
    settings: Settings,
    names: Sequence[str],
    options: runner.Options,
    files: Files,
    *,
    want_json: bool,
) -> int:
    if files.kept is not None:
        _refuse_beside_from()
    if files.plot is not None:
        plots.check(files.plot)

    for file in filter(None, (files.output, files.plot)):
        results.check_writable(file)

    measured = _results(settings, names, options, files.kept)

    with contextlib.ExitStack() as keeping:  # each is tried, whatever becomes of the others
        if files.plot is not None:
            keeping.callback(plots.plot, measured, files.plot)
        if files.output is not None:
            keeping.callback(results.write, measured, files.output)

        if want_json:
            click.echo(results.to_json(measured))
        else:
            table.print_results(output.console(), measured)

    if files.kept is not None:
        return os.EX_OK

    runner.end(measured)
    if measured.refused:
        return 1
    return os.EX_OK


def compare(before: Path, after: Path, *, want_json: bool) -> int:
    comparison = comparing.compare(results.read(before), results.read(after))
    if want_json:
        click.echo(results.to_json(comparison))
    else:
        table.print_comparison(output.console(), comparison)
    return os.EX_OK


def _results(
    settings: Settings, names: Sequence[str], options: runner.Options, kept: Path | None
) -> results.Results:
    if kept is not None:
        return results.read(kept)
    return _measure(settings, names, options)


def _measure(settings: Settings, names: Sequence[str], options: runner.Options) -> results.Results:
    try:
        return runner.run(settings, names, options, Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        left = ""
        if options.sweep:
            left = "; the sweep's prompts were removed"
        with contextlib.suppress(OSError):  # the terminal may be closed
            click.echo(f"interrupted: nothing of it was kept{left}", err=True)
        raise


def _refuse_beside_from() -> None:
    """Errors: UsageError for an option that asks to measure."""
    context = click.get_current_context()
    words = {
        "names": "a name",
        "runs": "--runs",
        "sweep": "--sweep",
        "direct": "--direct",
        "output": "--output",
    }
    for name, word in words.items():
        # click reports the command line as the source of a missing argument, too.
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and context.params[name] != ():
            raise UsageError(
                f"--from measures nothing, {word} does not go with it",
                hint="leave one of them out; --plot and --json go with --from",
            )
