"""Ends the program: exit codes, errors as sentences, output that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from rkcached.cli import output
from rkcached.errors import (
    ManifestError,
    OutputError,
    Problem,
    RequestError,
    RkcachedError,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from rkcached.cli import forms


def run(command: click.Command, arguments: Sequence[str] | None) -> NoReturn:
    """The program: errors become a sentence on standard error and an exit code."""
    _write_what_the_terminal_has()
    try:
        code = _code_of(command, arguments)
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough
        code = 141
    except OSError as error:
        if not _is_of_output(error):
            raise
        failed = OutputError(
            f"standard output cannot be written: {error.strerror}",
            hint="redirect it to another file, or make room on that disk",
        )
        report(failed, arguments)
        code = failed.exit_code

    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        _finish(stream)

    sys.exit(code)


def _write_what_the_terminal_has() -> None:
    """Have letters that the terminal's encoding lacks written as escapes, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of a file that cannot tell its place
                stream.reconfigure(errors="backslashreplace")


def _code_of(command: click.Command, arguments: Sequence[str] | None) -> int | str | None:
    """The exit code of a command. Errors: OSError of standard output, BrokenPipeError."""
    output = sys.stdout
    try:
        code = command.main(arguments, prog_name="rkcached", standalone_mode=False)
    except RkcachedError as error:
        report(error, arguments)
        return exit_code(error)
    except click.ClickException as error:
        return _report_click(error, arguments)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as left:
        # click (which then replaces the stream) and rich end with 1 where a pipe is closed.
        if sys.stdout is not output or isinstance(left.__context__, BrokenPipeError):
            raise BrokenPipeError from left
        return left.code

    if isinstance(code, int):
        return code
    return os.EX_OK


def _is_of_output(error: OSError) -> bool:
    """Whether the error is one of standard output: the text stays there, so a flush fails, too.

    Unless it was too much for that.

    An error of any other file carries its name, and is reported where that is written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        return True

    return error.filename is None and error.errno in _OUTPUT


_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _finish(stream: TextIO) -> None:
    """Drop what still cannot be written, as Python would complain of it at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(error: RkcachedError) -> int:
    """The exit code of an error; a refused request is wrong input, unless the daemon has failed."""
    if not isinstance(error, RequestError):
        return error.exit_code

    by_status = {
        404: os.EX_NOINPUT,
        502: os.EX_SOFTWARE,
        503: os.EX_UNAVAILABLE,
        504: os.EX_UNAVAILABLE,
    }

    return by_status.get(error.status, os.EX_DATAERR if error.status < 500 else os.EX_SOFTWARE)


def _report_click(error: click.ClickException, arguments: Sequence[str] | None) -> int:
    """Report what click found wrong; returns its exit code."""
    code = error.exit_code
    if isinstance(error, click.UsageError):
        code = os.EX_USAGE

    if _wants_json(arguments):
        usage = "see --help"
        if isinstance(error, click.UsageError) and error.ctx is not None:
            usage = error.ctx.get_usage()
        _write_failure(UsageError(error.format_message(), hint=usage), code)
    else:
        with contextlib.suppress(OSError):
            error.show()
    return code


def report(error: RkcachedError, arguments: Sequence[str] | None) -> None:
    if _wants_json(arguments):
        _write_failure(error, exit_code(error))
    else:
        complain(error)


def _wants_json(arguments: Sequence[str] | None) -> bool:
    """Whether --json is among the options: also where the rest of the line is wrong."""
    words = sys.argv[1:] if arguments is None else arguments
    return "--json" in itertools.takewhile(lambda word: word != "--", words)


def _write_failure(error: RkcachedError, code: int) -> None:
    """Write the error as a line of JSON on standard error, if that can be written."""
    problems: tuple[Problem, ...] = ()
    if isinstance(error, ManifestError):
        problems = error.problems
    refused = None
    if isinstance(error, RequestError):
        refused = error.code

    failed: forms.Failed = {
        "format": 1,
        "error": {
            "message": error.message,
            "hint": error.hint,
            "exit_code": code,
            "code": refused,
            "problems": output.problems_data(problems),
        },
    }
    with contextlib.suppress(OSError):
        click.echo(output.json_text(failed), err=True)


def complain(error: RkcachedError) -> None:
    """Say it in words on standard error, if that can be written."""
    if isinstance(error, ManifestError):
        lines = [str(problem) for problem in error.problems]
    else:
        lines = [f"error: {error.message}"]
        if error.hint:
            lines.append(f"hint: {error.hint}")

    with contextlib.suppress(OSError):
        for line in lines:
            click.echo(printable(line), err=True)
