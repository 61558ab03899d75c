"""Ends the program: exit codes, errors as sentences, output that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import click

from rkcached.errors import ManifestError, OutputError, RequestError, RkcachedError, printable


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
        complain(failed)
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
        complain(error)
        return exit_code(error)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        if isinstance(error, click.UsageError):
            return os.EX_USAGE
        return error.exit_code
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


def complain(error: RkcachedError) -> None:
    """On standard error, if that can be written."""
    if isinstance(error, ManifestError):
        lines = [str(problem) for problem in error.problems]
    else:
        lines = [f"error: {error.message}"]
        if error.hint:
            lines.append(f"hint: {error.hint}")

    with contextlib.suppress(OSError):
        for line in lines:
            click.echo(printable(line), err=True)
